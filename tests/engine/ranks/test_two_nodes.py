"""Two nodes that torchrun joins: at two addresses of this machine, and, where the kernel lets this
user make them, in two network namespaces that only a cable connects."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.engine.front.llm import LLM
from longspan.engine.request import SamplingParams
from tests.doubles import write_checkpoint

TIMEOUT_S = 120
NAMESPACE = "unshare --user --map-root-user --net"
"""Begins a namespace whose owner may make further ones in it."""
SECOND = """
ip link set lo up
unshare --net sleep {timeout} & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add cable type veth peer name cable netns $other
ip addr add 10.213.7.1/24 dev cable && ip link set cable up
there="nsenter --target $other --net"
$there ip link set lo up
$there ip addr add 10.213.7.2/24 dev cable && $there ip link set cable up
"""
RUN = """
{there} {second} > second.txt 2>&1 & node=$!
{first}; status=$?
wait $node; echo "second: $?" >&2; cat second.txt >&2
[ -z "$other" ] || kill $other
exit $status
"""
TEXT = "".join(chr(random.Random(1).randrange(97, 122) + index % 2) for index in range(1200))


def makes_namespaces() -> bool:
    """Whether this user may lay a cable between two network namespaces."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    script = SECOND.format(timeout=1) + "$there ping -c 1 -W 2 10.213.7.1 || $there ip route"
    done = subprocess.run([*NAMESPACE.split(), "bash", "-e", "-c", script], capture_output=True,
                          check=False, timeout=20)
    return done.returncode == 0


PLACES = ["addresses", *["namespaces"] * makes_namespaces()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(("place", "shared"), [
    pytest.param(place, shared, id=place)
    for place, shared in (("addresses", "--tp 2"), ("namespaces", "")) if place in PLACES])
def test_two_nodes_answer_as_one(tmp_path: Path, place: str, shared: str) -> None:
    """By heads over two addresses, by rows over two namespaces."""
    path = tmp_path / "model"
    path.mkdir()
    write_checkpoint(path)
    (tmp_path / "prompt.txt").write_text(TEXT)
    apart = place == "namespaces"
    address, card = ("10.213.7.1", "cable") if apart else ("127.0.0.2", "lo")
    command = (
        f"{shlex.quote(sys.executable)} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 "
        f"--master-addr {address} --master-port {free_port()} --node-rank {{rank}} "
        f"-m longspan.cli generate {shlex.quote(str(path))} --prompt-file prompt.txt --raw --json "
        f"--max-tokens 4 --threads 1 --memory-gib 0.8 --max-model-len 2048 "
        f"--prefill-chunk-len 512 {shared}")
    script = (SECOND.format(timeout=TIMEOUT_S) if apart else "") + RUN.format(
        there="$there" if apart else "", first=command.format(rank=0),
        second=command.format(rank=1))
    done = subprocess.run(
        [*(NAMESPACE.split() if apart else ()), "bash", "-c", script], capture_output=True,
        text=True, check=False, cwd=tmp_path, timeout=TIMEOUT_S, env={
            **os.environ, "GLOO_SOCKET_IFNAME": card,
            "PYTHONPATH": str(Path(__file__).parents[3])})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "second: 0" in done.stderr
    (line,) = done.stdout.splitlines()  # of rank 0 alone
    with LLM(str(path), num_threads=1, memory_gib=0.8, max_model_len=2048,
             prefill_chunk_len=512) as llm:
        (wanted,) = llm.generate(TEXT, SamplingParams(max_tokens=4))
    assert tuple(json.loads(line)["token_ids"]) == wanted.token_ids
