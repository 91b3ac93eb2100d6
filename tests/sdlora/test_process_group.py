"""A fit whose batches two processes share learns what one process learns, and both ranks hold the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from sdlora.process_group import SINGLE, ProcessGroup, join_group
from sdlora.tensors import read_tensors, write_tensors
from tests.support.repository import REPOSITORY
from tests.support.tiny_model import everything, finish, learn, make_fit

OPTIONS = {"crop_scale": 0.5, "flip": True, "epochs": 2}


def test_the_shares_of_a_batch_are_the_batch() -> None:
    """Also where there are more ranks than images; the first share is never empty."""
    for images in range(1, 6):
        batch = torch.arange(images)
        shares = [ProcessGroup(rank, 3).share(batch) for rank in range(3)]
        assert torch.equal(torch.cat(shares), batch)
        assert len(shares[0]) == -(-images // 3)
    assert torch.equal(SINGLE.share(batch), batch)


def learn_as_rank(rank: int, folder: Path, methods: list[str]) -> None:
    """What each of two processes does: fit after fit, each result into a file."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "meeting"), 2)
    group = join_group(rank, 2, store=store, device=device)
    assert group.spread(b"first" if rank == 0 else b"", device=device) == b"first"
    for method in methods:
        fit = make_fit(learn(1, method=method), 2, method=method, group=group, **OPTIONS)
        write_tensors(folder / f"{method}-{rank}.safetensors", everything(finish(fit)))
        (folder / f"{method}-{rank}.json").write_text(json.dumps(fit.curve))


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_and_hold_the_same_bits(tmp_path: Path) -> None:
    """Batches of seven images and a rest of three, so that shares differ; methods with and without a penalty."""
    methods = ["sdlora", "olora"]
    command = (
        "from tests.sdlora.test_process_group import learn_as_rank, Path; "
        f"learn_as_rank({{}}, Path({str(tmp_path)!r}), {methods})"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", command.format(rank)], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    for method in methods:
        alone = make_fit(learn(1, method=method), 2, method=method, **OPTIONS)
        expected = everything(finish(alone))
        first, second = (read_tensors(tmp_path / f"{method}-{rank}.safetensors") for rank in range(2))
        assert first.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
        for found, known in zip(
            json.loads((tmp_path / f"{method}-0.json").read_text()), alone.curve, strict=True
        ):
            assert found == pytest.approx(list(known), rel=1e-4)
