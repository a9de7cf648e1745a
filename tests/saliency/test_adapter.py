"""Our scores inside torch-pruning's pruners."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from slimfuse.errors import UserError
from slimfuse.saliency.adapter import MaskFisherImportance, WeightImportance

EXACT = {"rtol": 1e-6, "atol": 1e-7}  # scores are float32


class Net(nn.Module):
    """Two convolutions on one residual stream, and an MLP behind a flattening: 1 → 5 → 3 classes.

    Sizes are distinct, so that a wrong axis can't pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.inner, self.outer = nn.Conv2d(5, 7, 1), nn.Conv2d(7, 5, 3, padding=1)
        self.hidden, self.head = nn.Linear(5 * 4, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        out: Tensor = self.head(self.hidden(x.flatten(1)).tanh())
        return out


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.double().eval()


def batches(n: int = 30) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 2, 2, generator=generator).double()
    return list(
        zip(x.split(13), torch.randint(3, (n,), generator=generator).split(13), strict=True)
    )


def graph(model: nn.Module) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, torch.zeros(1, 2, 2, 2).double())


def group_of(model: nn.Module, layer: nn.Module) -> tp.Group:
    prune = (
        tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
    )
    size = layer.weight.shape[0]
    assert isinstance(size, int)
    return graph(model).get_pruning_group(layer, prune, idxs=list(range(size)))


def by_readers(model: Net, readers: dict[str, int]) -> Tensor:
    """Return E_n (Σ wᵀ∂L_n/∂w)² over readers' weights; name -> places a channel has in them."""
    rows = []
    for x, y in batches():
        for n in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            total = torch.zeros(()).double()
            for name, places in readers.items():
                w = model.get_submodule(name).weight
                (g,) = torch.autograd.grad(loss, [w], retain_graph=True)
                product = (w * g).detach().transpose(0, 1).flatten(1).sum(1)
                total = total + product.view(-1, places).sum(1)
            rows.append(total)
    return torch.stack(rows).square().mean(0)


def test_a_groups_score_is_the_mask_fisher_of_all_its_readers() -> None:
    model = net()
    importance = MaskFisherImportance()
    importance.observe(model, batches())
    # the residual stream: read by `inner`, and flattened with four places a channel by `hidden`
    for layer, readers in (
        (model.first, {"inner": 1, "hidden": 4}),
        (model.inner, {"outer": 1}),
        (model.hidden, {"head": 1}),
    ):
        got = importance(group_of(model, layer))
        assert got is not None
        torch.testing.assert_close(2 * got.double(), by_readers(model, readers), **EXACT)


def test_damping_leads_to_magnitude() -> None:
    model = net()
    importance = MaskFisherImportance(damping=1e9)
    importance.observe(model, batches())
    got = importance(group_of(model, model.inner))
    norms = model.outer.weight.detach().square().sum((0, 2, 3))
    assert got is not None
    torch.testing.assert_close((got / got.sum()).double(), norms / norms.sum(), **EXACT)


def test_the_nets_own_output_is_scored_where_it_is_written() -> None:
    model = net()
    importance = MaskFisherImportance()
    importance.observe(model, batches())
    got = importance(group_of(model, model.head))
    assert got is not None and bool((got > 0).all())


def test_scores_of_single_weights_are_summed() -> None:
    model = net()
    scores = {name: p.detach().square() for name, p in model.named_parameters()}
    got = WeightImportance(model, scores)(group_of(model, model.first))
    truth = model.inner.weight.square().sum((0, 2, 3)) + (
        model.hidden.weight.square().sum(0).view(5, 4).sum(1)
    )
    assert got is not None
    torch.testing.assert_close(got.double(), truth.detach(), **EXACT)


def test_a_pruner_takes_the_channels_that_no_one_reads() -> None:
    model = net()
    with torch.no_grad():
        model.outer.weight[:, [1, 4, 6]] = 0
        model.head.weight[:, [0, 3]] = 0
    before = model(batches()[0][0])
    importance = MaskFisherImportance()
    importance.observe(model, batches())
    pruner = tp.pruner.BasePruner(
        model, torch.zeros(1, 2, 2, 2).double(), importance=importance, pruning_ratio=0.0,
        pruning_ratio_dict={model.inner: 3 / 7, model.hidden: 2 / 11}, ignored_layers=[model.head],
    )  # fmt: skip
    pruner.step()
    assert model.inner.weight.shape[0] == 4
    assert model.hidden.weight.shape[0] == 9
    torch.testing.assert_close(model(batches()[0][0]), before, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="was pruned since"):
        importance(group_of(model, model.inner))


def test_what_was_not_observed_is_said() -> None:
    model = net()
    with pytest.raises(UserError, match="weren't observed"):
        MaskFisherImportance()(group_of(model, model.first))
    with pytest.raises(UserError, match="no sample"):
        MaskFisherImportance().observe(model, [])
    with pytest.raises(UserError, match="no scores"):
        WeightImportance(model, {})(group_of(model, model.first))


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_channel_of_a_grouped_convolution_is_read_by_its_own_group(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(10, 20, 3, groups=groups).double()
    scores = torch.rand_like(layer.weight)
    model = nn.Sequential(layer)
    found = WeightImportance(model, {"0.weight": scores}).values(layer, "input")
    whole = torch.zeros(20, 10, 3, 3).double()  # the same layer, noughts between the groups
    for g in range(groups):
        rows = slice(g * 20 // groups, (g + 1) * 20 // groups)
        whole[rows, g * 10 // groups : (g + 1) * 10 // groups] = scores[rows]
    torch.testing.assert_close(found[0], whole.sum((0, 2, 3)), **EXACT)
    out = WeightImportance(model, {"0.weight": scores}).values(layer, "output")
    torch.testing.assert_close(out[0], scores.sum((1, 2, 3)), **EXACT)


def test_a_net_that_folds_tokens_into_samples_is_refused() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            folded = self.inner(x.flatten(0, 1)).tanh().view(len(x), 5, 6)
            out: Tensor = self.head(folded.mean(1))
            return out

    x, y = torch.randn(7, 5, 4), torch.randint(3, (7,))
    with pytest.raises(UserError, match=r"folds something else") as caught:
        MaskFisherImportance().observe(Folding(), [(x, y)])
    assert "35 rows, 7 losses" in str(caught.value)
