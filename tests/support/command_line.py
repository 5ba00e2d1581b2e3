"""Call verbs of the command line in the process of the tests."""

from typer.testing import CliRunner, Result

from prunus.cli import app


def call(*arguments: object, status: int = 0) -> Result:
    """Run a verb in this process and check its exit status."""
    result = CliRunner(env={"PRUNUS_DATA": None}).invoke(
        app, [str(argument) for argument in arguments]
    )
    assert result.exit_code == status, result.output
    return result
