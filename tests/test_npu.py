"""
model.py's NPU branches against its plain bodies, on CPU tensors, with reference kernels in place of torch_npu's.

This shows the calls: names, types, conventions of masks, slots and counts, and the backward that we wrote for the
grouped matmul. Nothing of this project ever ran on an NPU; npu_fake.py checks the rest that needs no hardware.
"""
from dataclasses import replace

import pytest
import torch

import model
import npu_reference_ops
import smoke

LIBRARY = npu_reference_ops.install()


@pytest.fixture
def branch(monkeypatch):
    """branch("npu") makes every operator take that body whatever the device."""
    return lambda kind: monkeypatch.setattr(model, "backend", lambda x: kind)


def gradients(outputs, inputs):
    """Of a fixed random combination of outputs, to inputs; outputs that carry none are passed by."""
    generator = torch.Generator().manual_seed(1)
    outputs = [y for y in outputs if y.requires_grad]
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], weights)


def compare(branch, operator, *inputs):
    """Values and gradients of the two bodies, in float64 to 1e-12; types and shapes too."""
    results = []
    for kind in ("plain", "npu"):
        branch(kind)
        outputs = operator(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append((*outputs, *gradients(outputs, inputs)))
    for plain, npu in zip(*results, strict=True):
        torch.testing.assert_close(npu, plain, rtol=1e-12, atol=1e-12)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_rms_norm(branch):
    compare(branch, lambda x, w: model.rms_norm(x, w, 1e-5), normal(2, 3, 8), normal(8))


def test_swiglu(branch):
    compare(branch, model.swiglu, normal(5, 12))
    compare(branch, model.swiglu, normal(5, 12), normal(5))


@pytest.mark.parametrize("batch", [1, 2])
def test_rope(branch, batch):
    """Interleaved pairs; angles that differ in a batch are refused by the fused operator and take the plain body."""
    angle = torch.randn(batch, 6, 1, 4, dtype=torch.float64)
    compare(branch, lambda x: model.rope(x, angle.cos(), angle.sin()), normal(2, 6, 3, 8))


def test_attention_causal(branch):
    """Queries and keys wider than values, as in latent attention; their mask says True for what is left out."""
    def operator(q, k, v):
        return model.attention(q, k, v, 0.3)
    compare(branch, operator, normal(2, 7, 4, 6), normal(2, 7, 4, 6), normal(2, 7, 4, 4))


def test_attention_inside_documents(branch):
    mask = model.document_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]))

    def operator(q, k, v):
        return model.attention(q, k, v, 0.3, mask)
    compare(branch, operator, normal(2, 7, 4, 6), normal(2, 7, 4, 6), normal(2, 7, 4, 4))


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [0, 0, 0, 16], [16]], ids=str)
def test_grouped_matmul(branch, counts):
    """With an expert that gets no row, with all rows at one, and with a single expert."""
    def operator(x, weight):
        return model.grouped_matmul(x, weight, torch.tensor(counts))
    compare(branch, operator, normal(16, 8), normal(len(counts), 12, 8))


def test_grouped_matmul_deferred(branch):
    """The weight gradient that the store computes later equals the one computed at once."""
    branch("npu")
    x, weight, store = normal(16, 8), normal(4, 12, 8), model.WeightGradStore()
    counts = torch.tensor([3, 0, 5, 8])
    now = torch.autograd.grad(model.grouped_matmul(x, weight, counts).square().sum(), weight)[0]
    model.grouped_matmul(x, weight, counts, store).square().sum().backward()
    assert weight.grad is None and len(store.pending) == 1
    store.pop()
    torch.testing.assert_close(weight.grad, now, rtol=1e-12, atol=1e-12)


def test_permute_and_unpermute(branch):
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(9)])

    def there_and_back(x):
        rows, slot = model.permute(x, ids)
        return rows, slot.long(), model.unpermute(rows.square(), slot)
    compare(branch, there_and_back, normal(9, 8))


def tiny_model(**changes):
    config = replace(model.PRESETS["tiny"], hidden_size=32, num_hidden_layers=2, vocab_size=96, intermediate_size=48,
                     q_lora_rank=16, kv_lora_rank=16, moe_intermediate_size=16, **changes)
    built = model.Model(config)
    built.init_weights(0)
    return built


def losses_and_gradients(built, **inputs):
    built.zero_grad()
    out = built(inputs["labels"], **inputs)
    out.total_loss.backward()
    grads = {name: parameter.grad for name, parameter in built.named_parameters()}
    return {"loss": out.loss, "mtp_loss": out.mtp_loss, "aux_loss": out.aux_loss, **grads}


VARIANTS = [{}, {"capacity_factor": 1.0}, {"capacity_factor": 1.5}, {"expert_weight": "after_down"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_whole_model(branch, changes):
    """Losses and every gradient of the two branches, in float64."""
    built = tiny_model(**changes).double()
    ids = torch.randint(0, 96, (2, 12))
    branch("plain")
    plain = losses_and_gradients(built, labels=ids)
    branch("npu")
    npu = losses_and_gradients(built, labels=ids)
    for name in plain:
        error = (npu[name] - plain[name]).abs().max()
        assert error <= 1e-9 * plain[name].abs().max(), f"{name}: off by {error:.1e}"


def test_whole_model_in_bfloat16(branch):
    """float32 masters under bfloat16 activations: the kernels refuse mixed types; gradients agree within rounding."""
    built = tiny_model()
    built.compute_dtype = torch.bfloat16
    ids, routing = torch.randint(0, 96, (2, 12)), {}
    branch("plain")
    plain = losses_and_gradients(built, labels=ids, routing=routing)
    branch("npu")
    npu = losses_and_gradients(built, labels=ids, routing=routing)
    for name in plain:
        difference = (npu[name] - plain[name]).norm() / plain[name].norm().clamp(min=1e-6)
        assert difference < 0.05, f"{name}: relative difference {difference:.3f}"


def test_reference_kernels_refuse_what_the_real_ones_do(branch):
    """The argument is spelt pre_tockens; mixed types, counts of length 1 and a wrong mask are refused."""
    npu, q = torch.ops.npu, torch.randn(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match="pre_tokens"):
        npu.npu_fusion_attention(q, q, q, 1, "BSND", pre_tokens=1)
    with pytest.raises(NotImplementedError, match="keep_prob"):
        npu.npu_fusion_attention(q, q, q, 1, "BSND", keep_prob=0.9)
    with pytest.raises(AssertionError, match="2048"):
        npu.npu_fusion_attention(q, q, q, 1, "BSND", atten_mask=torch.ones(2, 2).bool(), sparse_mode=2)
    with pytest.raises(AssertionError, match="int4"):
        grouped = dict(group_list=torch.tensor([2, 2]), split_item=3, group_type=0, group_list_type=0)
        npu.npu_grouped_matmul([torch.ones(2, 8).bfloat16()], [torch.ones(2, 8, 4)], **grouped)
    with pytest.raises(AssertionError, match="length 1"):
        grouped = dict(group_list=torch.tensor([2]), split_item=3, group_type=0, group_list_type=1)
        npu.npu_grouped_matmul([torch.ones(2, 8)], [torch.ones(1, 8, 4)], **grouped)


def test_device_report(monkeypatch, capsys):
    """smoke.py, the first thing to run on a real device, on these branches and kernels: nothing beyond its limit."""
    monkeypatch.setattr(model, "backend", lambda x: "npu" if model.FUSED else "plain")
    for dtype in smoke.LIMITS:
        assert smoke.check_operators(torch.device("cpu"), dtype, 64) == 0, capsys.readouterr().out
