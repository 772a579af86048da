"""How adapters add to the layers of a model."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from selfsteer.adapters import add_before_rounding


class Two(nn.Module):
    """Layers without a bias and with one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 96, bias=False)
        self.biased = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.plain(x), self.biased(x)], dim=-1)


def adapted(size: float, *, names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """The adapters add about `size` to outputs of about 1."""
    torch.manual_seed(0)
    configuration = LoraConfig(r=4, lora_alpha=8, target_modules=["plain", "biased"], **settings)
    model: Any = get_peft_model(Two(), configuration)  # pyright: ignore[reportArgumentType]
    for name in names[1:]:
        model.add_adapter(name, configuration)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=size)
            elif "base_layer.weight" in name:
                weights.normal_(std=1 / 8)
    return model.eval()


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).float()


def share_seen(model: Any, x: Tensor) -> float:
    """Of what the adapter adds in float32, how much of it is in the output in bfloat16: 1, but for noise."""
    with torch.no_grad():
        exact = model(x)
        with model.disable_adapter():
            wanted = exact - model(x)
    with model.disable_adapter():
        before = outputs(model, x)
    found = outputs(model, x) - before
    plain = slice(0, 96)
    return float((found * wanted)[..., plain].sum() / wanted[..., plain].square().sum())


@pytest.mark.parametrize("shape", [(300, 64), (1, 300, 64), (2, 150, 64)], ids=str)
def test_what_is_small_is_seen(shape: tuple[int, ...]):
    """A thousandth of the output lies below half of what bfloat16 tells apart (1 in 256)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = adapted(1e-4)
    assert share_seen(model, x) < 0.3, "as peft adds it"
    add_before_rounding(model)
    assert share_seen(model, x) == pytest.approx(1, abs=0.1)


def test_what_adds_nothing_changes_no_bit():
    """The first margins are exactly zero, with a bias and without."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    model = adapted(0.0)
    add_before_rounding(model)
    with model.disable_adapter():
        before = outputs(model, x)
    assert torch.equal(outputs(model, x), before)


@pytest.mark.parametrize("case", ["float32", "two adapters", "merged", "rank-stabilised with weight decomposition"])
def test_the_rest_is_peft_s(case: str):
    """What is computed in float32, by several adapters or in a way of its own is left to peft, bit for bit."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    names = ("default", "other") if case == "two adapters" else ("default",)

    def found(*, ours: bool) -> Tensor:
        model = adapted(1e-2, names=names, **({"use_dora": True} if "decomposition" in case else {}))
        if ours:
            add_before_rounding(model)
        if case == "two adapters":
            model.base_model.set_adapter(list(names))
        if case == "merged":
            model.merge_adapter()
        with torch.no_grad():
            return model(x) if case == "float32" else outputs(model, x)

    assert torch.equal(found(ours=True), found(ours=False))


def test_a_gradient_is_that_of_the_merged_weights():
    """Of the adapter and of what comes in, in bfloat16 and against float32."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    model = adapted(1e-3)

    def gradients(*, half: bool) -> dict[str, Tensor]:
        given = x.clone().requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            model(given).float().square().mean().backward()
        assert given.grad is not None
        return {"x": given.grad} | {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}

    exact = gradients(half=False)
    add_before_rounding(model)
    found = gradients(half=True)
    assert found.keys() == exact.keys()
    assert len(found) == 5
    for name, wanted in exact.items():
        assert (found[name] - wanted).norm() < 0.02 * wanted.norm(), name
