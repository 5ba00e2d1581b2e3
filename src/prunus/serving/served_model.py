"""The only model that there is, as transformers' handlers look for it."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import Modality

from prunus.model.tokenizer import apply_chat_template
from prunus.serving.errors import RequestError


class ChatTokenizer:
    """A fast tokenizer in the place where transformers expects a processor.

    Its chat template runs within the limits of `apply_chat_template`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenize: bool = True,
        load_audio_from_video: bool = False,
        **variables: Any,
    ) -> Any:
        """The token ids of a chat. The arguments between `tools` and `variables` are not used.

        Raises:
            RequestError: the tokenizer has no chat template.
            ValueError: the template cannot be applied to these messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                400, "the model has no chat template; use /v1/completions", param="messages"
            )
        if tools:
            variables["tools"] = tools
        text = apply_chat_template(self.tokenizer, messages, **variables)
        # The template writes special tokens itself.
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of token ids."""
        text: str = self.tokenizer.decode(ids, **options)
        return text


class ServedModel(ModelManager):
    """Manages one model that is loaded already, and never loads another."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name
        processor = ChatTokenizer(tokenizer)
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=processor)

    def load_model_and_processor(
        self, model_id_and_revision: str, *_: Any, **__: Any
    ) -> tuple[Any, Any]:
        """The model and its tokenizer.

        Raises:
            RequestError: another model is asked for, or the server is about to end.
        """
        loaded = self.loaded_models.get(model_id_and_revision)
        if loaded is None:
            raise unknown_model(model_id_and_revision, str(self.force_model))
        return loaded.model, loaded.processor

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """A name as it is: it is neither a path nor an id with a revision."""
        return model_id

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        """Text in, text out."""
        return Modality.LLM

    def _load_model(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this server never loads a model")

    _load_processor = _load_model


def unknown_model(requested: str, served: str) -> RequestError:
    """The answer to a request for another model."""
    return RequestError(
        404,
        f"the model {requested[:200]!r} does not exist here; this server has {served!r}",
        code="model_not_found",
        param="model",
    )


def context_length(model: Any) -> int | None:
    """The largest number of tokens that a model can read; None where it states none."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
