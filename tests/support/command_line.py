"""Call verbs of the command line in the process of the tests."""

from transformers.utils import logging
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from prunus.cli.program import app

#: The whole command line. Typer would build it again for every call, and most calls take less time.
PROGRAM = get_command(app)
testing._get_command = lambda _app: PROGRAM


def call(*arguments: object, status: int = 0) -> Result:
    """Run a verb in this process and check its exit status."""
    before, runner = logging.get_verbosity(), CliRunner(env={"PRUNUS_DATA": None})
    result = runner.invoke(app, [str(argument) for argument in arguments])
    # The verb silences transformers in this process, which other tests share.
    logging.set_verbosity(before)
    logging.enable_progress_bar()
    assert result.exit_code == status, result.output
    return result
