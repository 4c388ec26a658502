"""The simulated accelerator of the tests: its numbers, what it refuses, and what it counts."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.simulated_device import DEVICES, SimulatedTensor, counting, simulated
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    with simulated():
        yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


FACTORIES: dict[str, Callable[[str], Tensor]] = {
    "zeros": lambda d: torch.zeros(3, device=d),
    "full": lambda d: torch.full((2,), 3.0, device=d),
    "eye": lambda d: torch.eye(3, device=d),
    "arange": lambda d: torch.arange(2, 9, 3, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 5, device=d),
    "tensor": lambda d: torch.tensor([[1.0, 2.0]], device=d),
    "rand": lambda d: torch.rand(4, device=d),
    "randn": lambda d: torch.randn(4, device=d, generator=torch.Generator(d).manual_seed(3)),
    "randint": lambda d: torch.randint(9, (5,), device=d),
    "randperm": lambda d: torch.randperm(6, device=d),
    "bernoulli": lambda d: torch.full((9,), 0.5, device=d).bernoulli_(),
    "tril_indices": lambda d: torch.tril_indices(3, 3, device=d),
    "new_tensor": lambda d: torch.zeros(2, device=d).new_tensor([1, 2]),
    "context": lambda d: _under(d),
}


def _under(device: str) -> Tensor:
    with torch.device(device):
        return torch.ones(2)


@pytest.mark.parametrize("name", FACTORIES)
def test_tensors_are_made_there_with_the_numbers_of_the_cpu(name: str, device: str) -> None:
    torch.manual_seed(0)
    expected = FACTORIES[name]("cpu")
    torch.manual_seed(0)
    made = FACTORIES[name](device)
    assert isinstance(made, SimulatedTensor) and made.device == torch.device(device)
    assert made.dtype == expected.dtype and torch.equal(made.cpu(), expected)


def test_a_model_trains_there_as_on_the_cpu(device: str) -> None:
    host = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4, bias=False))
    host[3].weight = nn.Parameter(host[0].weight.detach().T.clone())
    there = copy.deepcopy(host).to(device)
    x = torch.randn(3, 5, 4)
    for model in (host, there):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(next(model.parameters()).device)).square().sum().backward()
            optimizer.step()
    for one, two in zip(host.parameters(), there.parameters(), strict=True):
        assert two.device == two.grad.device == torch.device(device)
        assert torch.equal(one, two.cpu()) and torch.equal(one.grad, two.grad.cpu())


def test_parameters_stay_the_same_objects_and_tied(device: str) -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = weight = model[0].weight
    model.to(device)
    assert model[0].weight is model[1].weight is weight and weight.device == torch.device(device)
    assert isinstance(weight, nn.Parameter) and isinstance(copy.deepcopy(weight), nn.Parameter)
    assert copy.deepcopy(model)[0].weight.device == torch.device(device)
    weight.data = torch.ones(2, 3, device=device)
    assert model[1].weight.shape == (2, 3) and (model[1].weight @ model[0].bias).shape == (2,)
    model.to("cpu")
    assert model[1].weight is weight and weight.device.type == "cpu"


def test_views_and_out_arguments_write_where_they_should(device: str) -> None:
    x = torch.arange(6.0, device=device).view(2, 3)
    x[0] += 10
    x.T[2].zero_()
    x[x > 11] = -1
    assert x.tolist() == [[10.0, 11.0, 0.0], [3.0, 4.0, 0.0]]
    made = torch.empty(0, device=device)
    torch.cat([x, x], out=made)
    assert made.shape == (4, 3) and torch.equal(made.cpu(), x.cpu().repeat(2, 1))


def test_files_keep_the_device(device: str) -> None:
    file = io.BytesIO()
    torch.save({"x": torch.ones(2, device=device)}, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["x"].device == torch.device(device)


@pytest.mark.parametrize(
    "name", ["linear", "matmul", "bmm", "conv2d", "attention", "layer_norm", "softmax", "mse_loss"]
)
def test_autocast_is_that_of_the_cpu(name: str, device: str) -> None:
    x, square = torch.randn(2, 4, 8, 8), torch.randn(3, 8, 8)
    work: dict[str, Callable] = {
        "linear": lambda x, s: F.linear(x, s[0]),
        "matmul": lambda x, s: x @ s[0],
        "bmm": lambda x, s: torch.bmm(s, s),
        "conv2d": lambda x, s: F.conv2d(x, x[:, :, :3, :3]),
        "attention": lambda x, s: F.scaled_dot_product_attention(x, x, x),
        "layer_norm": lambda x, s: F.layer_norm(x, (8,)),
        "softmax": lambda x, s: F.linear(x, s[0]).softmax(-1),
        "mse_loss": lambda x, s: F.mse_loss(F.linear(x, s[0]), x),
    }
    found = []
    for kind in ("cpu", device):
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.autocast(torch.device(kind).type, torch.bfloat16), math:
            found.append(work[name](x.to(kind), square.to(kind)))
    assert found[0].dtype == found[1].dtype and torch.equal(found[0], found[1].cpu())


MIXED: dict[str, Callable[[Tensor], object]] = {
    "add": lambda x: x + torch.ones(3),
    "add to the host": lambda x: torch.ones(3) + x,
    "in place of the host": lambda x: torch.ones(3).add_(x),
    "host scalar in place": lambda x: torch.tensor(1.0).add_(x[0]),
    "device scalar": lambda x: torch.ones(3) * x[0],
    "stack with a host scalar": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "matmul": lambda x: x @ torch.ones(3, 2),
    "host index": lambda x: x[torch.tensor([0])],
    "index of the host": lambda x: torch.ones(3)[x.long()],
    "numpy": lambda x: x.numpy(),
    "other device": lambda x: x + x.to("sim:0" if x.device.index else "sim:1"),
    "backward": lambda x: F.mse_loss(x, torch.ones(3)),
    "where": lambda x: torch.where(x > 0, x, torch.ones(3)),
    "optimizer": lambda x: torch._foreach_add_([x], [torch.ones(3)]),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|subclasses"):
        MIXED[name](torch.zeros(3, device=device))


def test_host_scalars_are_taken_by_pointwise_operations(device: str) -> None:
    x, one = torch.zeros(3, device=device), torch.tensor(1.0)
    assert (x + one).tolist() == (one + x).tolist() == torch.where(x == 0, one, x).tolist()


SYNCS: dict[str, tuple[Callable[[Tensor], object], str | None]] = {
    "item": (lambda x: x[0].item(), "item"),
    "bool": (lambda x: bool((x > 0).any()), "item"),
    "format": (lambda x: f"{x.sum():.2f}", "item"),
    "device index": (lambda x: torch.arange(3)[int(x[0])], "item"),
    "equal": (lambda x: torch.equal(x, x), "item"),
    "tolist": (lambda x: x.tolist(), "to_host"),
    "cpu": (lambda x: x.cpu(), "to_host"),
    "copy to the host": (lambda x: torch.empty(3).copy_(x), "to_host"),
    "from the host": (lambda x: torch.ones(3).to(x.device), "to_device"),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), "to_device"),
    "mask": (lambda x: x[x > 0], "shape"),
    "mask of rows": (lambda x: x[:, None][x > 0], "shape"),
    "assign by mask": (lambda x: x.__setitem__(x >= 0, x + 1), "shape"),
    "nonzero": (lambda x: x.nonzero(), "shape"),
    "unique": (lambda x: x.unique(), "shape"),
    "cholesky": (lambda x: torch.linalg.cholesky(torch.eye(2, device=x.device)), "check"),
    "synchronize": (lambda x: torch.get_device_module("sim").synchronize(), "synchronize"),
    "add": (lambda x: x + 1, None),
    "to the same device": (lambda x: x.to(x.device), None),
    "dtype": (lambda x: x.double(), None),
    "index": (lambda x: x[x.long()], None),
    "assign one value by mask": (lambda x: x.__setitem__(x > 0, 0), None),
    "where": (lambda x: torch.where(x > 0, x, 0), None),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(torch.eye(2, device=x.device)), None),
}


@pytest.mark.parametrize("name", SYNCS)
def test_synchronisations_are_counted(name: str, device: str) -> None:
    x = torch.zeros(3, device=device)
    work, cause = SYNCS[name]
    with counting() as counts:
        work(x)
    assert counts.syncs == ({} if cause is None else {cause: 1})


def test_launches_are_operations_that_are_no_views() -> None:
    x = torch.ones(2, 3, device="sim:0")
    with counting() as outer:
        with counting() as inner:
            y = (x.T[1:] * 2).reshape(-1).unsqueeze(0).expand(2, -1)
            y.sum().add_(1)
        torch.empty(3, device="sim:0")
        torch.zeros(3, device="sim:0")
    assert inner.launches == {"mul": 1, "sum": 1, "add_": 1, "clone": 1}
    assert outer.launches == {**inner.launches, "zero_": 1}
    x.mul_(2)
    assert outer.launches["mul_"] == 0


def test_outside_of_the_context_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.simulated_device._active", False)
    assert torch.accelerator.current_accelerator(check_available=True) is None
    monkeypatch.undo()
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("sim")
    assert torch.accelerator.device_count() == 2
