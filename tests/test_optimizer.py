"""Our Adam is torch's, and no training loads torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tiny_runs import settings

from dist_egnn import config as configs
from dist_egnn.optimizer import Adam

TRAIN = """
import sys
from dist_egnn import config, local, train
if __name__ == "__main__":
    chosen = config.load(sys.argv[1], [])
    local.run(train.train, 1, chosen)
    local.run(train.train, 1, chosen, True)
    print([name for name in sys.modules if name.startswith("torch._dynamo")])
"""


def test_the_numbers_and_the_state_of_torchs():
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3, dtype=torch.float64), torch.randn(9, 5, 3, dtype=torch.float64)
    found = []
    for first, second in ((Adam, Adam), (torch.optim.Adam, torch.optim.Adam), (Adam, torch.optim.Adam)):
        weights = torch.nn.Parameter(start.clone())
        optimizer = first([{"params": [weights], "lr": 0.1}], weight_decay=0.01)
        for k, gradient in enumerate(gradients):
            if k == 4:  # as a resumed run goes on
                state = optimizer.state_dict()
                optimizer = second([weights])
                optimizer.load_state_dict(state)
            weights.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert weights.grad is None
        found.append((weights.detach(), optimizer.state_dict()))
    for weights, state in found[1:]:
        assert torch.equal(weights, found[0][0])
        assert state["param_groups"] == found[0][1]["param_groups"]
        for key, value in state["state"][0].items():
            assert torch.equal(value, found[0][1]["state"][0][key])


def test_training_loads_no_compiler(small: Path, tmp_path: Path):
    chosen = settings(small, tmp_path / "run", "train.epochs=1")
    (tmp_path / "c.yaml").write_text(configs.to_yaml(chosen))
    (tmp_path / "go.py").write_text(TRAIN)
    ran = subprocess.run(
        [sys.executable, tmp_path / "go.py", tmp_path / "c.yaml"], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
