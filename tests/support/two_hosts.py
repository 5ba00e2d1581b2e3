"""A child of the test of two hosts: one launcher in each network namespace, as torchrun starts it.

python two_hosts.py PORT ADDRESS OUTPUT SPACE:DEVICE SPACE:DEVICE ARGUMENT…

Each launcher forks a rank that runs `prunus ARGUMENT…` and prints to OUTPUT0 or OUTPUT1. The script
prints the exit statuses of both launchers.
"""

import ctypes
import json
import os
import sys
from functools import partial

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kill_points import fork
from prunus.cli.program import app


def run(arguments: list[str]) -> None:
    app(arguments, standalone_mode=False)


def main() -> None:
    port, address, output, *hosts = sys.argv[1:6]

    def launch(number: int, host: str) -> None:
        space, _, device = host.partition(":")
        with open(f"/run/netns/{space}", "rb") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
        for descriptor in (1, 2):
            os.dup2(
                os.open(f"{output}{number}", os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor
            )
        os.environ["GLOO_SOCKET_IFNAME"] = device
        config = LaunchConfig(
            min_nodes=2,
            max_nodes=2,
            nproc_per_node=1,
            rdzv_endpoint=f"{address}:{port}",
            rdzv_backend="static",
            rdzv_configs={"rank": number},
            run_id="none",
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, run)(sys.argv[6:])

    launchers = [fork(partial(launch, *each)) for each in enumerate(hosts)]
    print(json.dumps([os.waitpid(process, 0)[1] for process in launchers]))


if __name__ == "__main__":
    main()
