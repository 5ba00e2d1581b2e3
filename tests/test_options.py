"""One declaration of an option gives its keyword, its check, its file and its error."""

import inspect
import pydoc
from typing import Annotated, ClassVar

import pytest

import prunus
from prunus.options import Option, Options, at_least, between, one_of, takes
from prunus.recovery.recovery_options import RecoveryOptions


class Speed(Options):
    ELSEWHERE: ClassVar[dict[str, str]] = {"wings": "this is a car"}

    gear: Annotated[int, Option("Drive in this gear.", within=at_least(1))] = 1
    share: Annotated[float | None, Option("Use this share.", within=between("(0, 1]"))] = None


@takes(Speed)
def drive(road, **options):
    """Drive."""
    return options


def test_keywords_of_a_function_are_those_of_its_options():
    assert str(inspect.signature(drive)).startswith("(road, *, gear: 'int' = 1, share")
    assert "gear: Drive in this gear." in drive.__doc__
    assert drive("a", gear=2) == {"gear": 2}
    for verb, options in (
        (prunus.prune, prunus.Recipe),
        (prunus.compress, prunus.CompressionRecipe),
        (prunus.shrink, prunus.StructureRecipe),
        (prunus.recover, RecoveryOptions),
    ):
        shown, parameters = pydoc.plain(pydoc.render_doc(verb)), inspect.signature(verb).parameters
        for name in {*options.declared(), "device", "data", "overwrite", "progress"}:
            assert parameters[name].annotation is not inspect.Parameter.empty, name
            assert f"{name}: " in shown.partition("Args:")[2], name


def test_options_are_read_from_files_objects_and_keywords(tmp_path):
    (tmp_path / "car.toml").write_text("gear = 3\n")
    car = Speed.read(tmp_path / "car.toml", {"share": 0.5, "gear": None})
    assert (car.gear, car.share) == (3, 0.5)
    assert Speed.read(car, {"gear": 2}).share == 0.5
    assert car.to_toml() == "gear = 3\nshare = 0.5\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gear": 0}, "gear must be at least 1; got 0"),
        ({"share": 0.0}, r"share must lie in \(0, 1\]; got 0$"),
        ({"gear": "first"}, r"gear must be a whole number \(got 'first'\)"),
        ({"wheels": 4}, "unknown option 'wheels'; known are gear, share"),
        ({"shares": 0.5}, r"unknown option 'shares'; did you mean share\?$"),
        ({"wings": 2}, "wings is not an option here: this is a car"),
        ({"gear": 0, "share": 2.0}, "gear must .*; share must"),
        ({"wheels": 4, "doors": 2}, "unknown option 'wheels'; known are [^;]*; .* 'doors'$"),
    ],
)
def test_errors_name_every_option_that_is_wrong(given, message):
    for make in (lambda: Speed.read(None, given), lambda: Speed(**given)):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            make()
        assert "Value error" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [50, 50.0, "50%"])
def test_a_share_in_percent_gets_a_hint(value):
    with pytest.raises(ValueError, match=r"share.*got .*did you mean 0\.5\?$"):
        Speed(share=value)


def test_every_option_of_a_recipe_is_declared():
    for kind in (prunus.Recipe, prunus.CompressionRecipe):
        assert kind.declared().keys() == kind.model_fields.keys()
        conditions = kind.names_of(lambda option: option.is_condition)
        assert {"calibration", "samples", "only"} <= conditions and "method" not in conditions


def test_a_list_of_choices_is_a_sentence():
    assert one_of((4, 6, 8)).must == "be 4, 6 or 8"
