"""``pf health``: whether a server takes calls.

Knows what `protoframe.health.Health` answers, and what that becomes.
"""

from __future__ import annotations

from typing import Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import write_json, write_text
from protoframe.cli.problems import STATUSES, clean

__all__ = ["health"]

#: The exit status where it takes none.
_NOT_READY = 1


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("protocols", metavar="[PROTOCOL]...", nargs=-1)
@shared
def health(where: str, protocols: tuple[str, ...], timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Ask a server whether it takes calls: of all that it serves, or of the Protocols that are named.

    Exits with 0 where it does, and with 1 where it does not, for one of them.  --quiet prints nothing.  With --json,
    one object: where, ready, and for each Protocol that was named whether it is.

    \b
    Examples:
      pf health tcp:127.0.0.1:12000
      pf health tcp:127.0.0.1:12000 Speech
    """
    from protoframe.cli.running import Progress, Target, converse, read_token, run

    settings = Settings(timeout, json, quiet, read_token(token_file))
    target = Target(where)
    ready: dict[str, bool] = {}

    async def session(reactor: Any) -> None:
        from protoframe.health import Health

        async with converse(reactor, target, settings) as connecting:
            proxy = connecting.connection.proxy(Health)
            for name in protocols or ("",):
                ready[name] = await proxy.check(name)

    run(session, target, settings, Progress(target, settings))
    is_ready = all(ready.values())
    if json:
        from json import dumps

        named = {name: ready[name] for name in protocols}
        write_json(dumps({"where": where, "ready": is_ready, "protocols": named}, ensure_ascii=False))
    elif not quiet:
        for name in protocols or ("",):
            write_text(clean(f"{name or where}: {'ready' if ready[name] else 'not ready'}"))
    if not is_ready:
        raise click.exceptions.Exit(_NOT_READY)
