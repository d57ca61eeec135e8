"""`bulkhead completion`: what makes a shell complete our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script with which SHELL completes commands, options, and the names of what there is.

    bash: eval "$(bulkhead completion bash)" in ~/.bashrc. zsh: the same in ~/.zshrc. fish: bulkhead completion fish >
    ~/.config/fish/completions/bulkhead.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "bulkhead", "_BULKHEAD_COMPLETE").source())
