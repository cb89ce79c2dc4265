"""
Plain kernels for the torch_npu operators that model.py calls, under their real schemas: they run on CPU tensors.

The schemas are those that torch_npu 2.13.0 prints (npu_fake.py compares them with the real package): a wrong name,
type or default of an argument fails here as it fails on an Ascend machine. The kernels follow the published
documentation and refuse what it does not allow; they say nothing about accuracy, speed or limits of the real ones.
An operator without a derivative in torch_npu has none here.

    import npu_reference_ops
    npu_reference_ops.install()          # once, in a process without torch_npu
    torch.ops.npu.npu_swiglu(x, -1)

An argument that a kernel below does not name must keep its default; setting it raises NotImplementedError.
"""
import functools
import inspect

import torch
import torch.nn.functional as F

KERNELS = {}          # schema -> (kernel, has a derivative)


def operator(schema, has_derivative=True):
    """Notes a kernel for install(). It receives by name the arguments that it declares."""
    def note(kernel):
        KERNELS[schema] = (kernel, has_derivative)
        return kernel
    return note


def install():
    """Registers all kernels as torch.ops.npu.*; returns the library, which must be kept alive."""
    library = torch.library.Library("npu", "DEF")
    for schema, (kernel, has_derivative) in KERNELS.items():
        library.define(schema)
        kernel = kernel if has_derivative else torch.no_grad()(kernel)
        call = by_name(torch._C.parse_schema("npu::" + schema), kernel)
        library.impl(schema.split("(")[0], call, "CompositeImplicitAutograd")      # autograd sees through the kernel
    return library


def by_name(schema, kernel):
    """The dispatcher passes some arguments by position: names them, refuses those that the kernel does not declare."""
    declared = inspect.signature(kernel).parameters

    @functools.wraps(kernel)
    def call(*args, **kwargs):
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given.update(zip(given, args), **kwargs)
        for argument in schema.arguments:
            if argument.name not in declared and given[argument.name] != argument.default_value:
                raise NotImplementedError(f"{schema.name}: no reference for {argument.name}={given[argument.name]}")
        return kernel(**{name: given[name] for name in declared})
    return call


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Norm, activation, rotary position


@operator("npu_rms_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)")
def npu_rms_norm(input, gamma, epsilon):
    assert input.dtype == gamma.dtype, f"{input.dtype}, {gamma.dtype}"
    x = at_least_float32(input)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * rstd * at_least_float32(gamma)).to(input.dtype), rstd


@operator("npu_swiglu(Tensor input, int dim=-1) -> Tensor")
def npu_swiglu(input, dim):
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


@operator('npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor')
def npu_rotary_mul(input, r1, r2, rotary_mode):
    width = input.size(-1)
    assert input.dim() == 4 and width % 2 == 0 and width < 896, f"documented: BSND, even D < 896, not {input.shape}"
    assert input.dtype == r1.dtype == r2.dtype, f"{input.dtype}, {r1.dtype}, {r2.dtype}"
    assert r1.shape == r2.shape and r1.size(-1) == width, f"cos and sin are as wide as a head: {r1.shape}"
    if rotary_mode == "half":
        a, b = input.chunk(2, -1)
        return r1 * input + r2 * torch.cat((-b, a), -1)
    assert rotary_mode == "interleave", rotary_mode
    assert r1.size(0) == r1.size(2) == 1, f"documented for interleave: cos and sin are (1, S, 1, D), not {r1.shape}"
    return r1 * input + r2 * torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@operator("npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False)"
          " -> (Tensor, Tensor)")
def npu_moe_token_permute(tokens, indices):
    """Rows sorted by expert, and the row that each (token, choice) went to: an int32 (N*K,)."""
    k = 1 if indices.dim() == 1 else indices.size(1)
    order = torch.argsort(indices.reshape(-1), stable=True)
    return tokens.index_select(0, order // k), torch.argsort(order, stable=True).to(torch.int32)


@operator("npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None,"
          " bool padded_mode=False, int[]? restore_shape=None) -> Tensor")
def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs):
    """Without probs each token has one row; with them (N, K) it is the weighted sum of its K rows."""
    assert sorted_indices.dim() == 1 and sorted_indices.dtype == torch.int32, "as npu_moe_token_permute returns them"
    rows = permuted_tokens.index_select(0, sorted_indices.long())
    if probs is None:
        return rows
    assert probs.dtype == rows.dtype, f"mixed types gave NaN gradients on hardware: {probs.dtype}, {rows.dtype}"
    return (rows.view(*probs.shape, -1) * probs.unsqueeze(-1)).sum(1)


@operator("npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None,"
          " Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None,"
          " Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None,"
          " Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, int? split_item=0,"
          " int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? tuning_config=None,"
          " int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None,"
          " int? per_token_scale_dtype=None) -> Tensor[]", has_derivative=False)
def npu_grouped_matmul(x, weight, group_list, split_item, group_type, group_list_type):
    """group_type 0: rows of x (M, K) in groups, weight (E, K, N). 2: x (K, M), weight (M, N) in groups -> (E, K, N)."""
    assert len(x) == len(weight) == 1 and split_item in (2, 3), "one tensor in, one tensor out"
    assert group_list.dtype == torch.int64, group_list.dtype
    assert group_list_type == 0 or group_list.numel() > 1, "documented: counts must not have length 1"
    (x,), (weight,) = x, weight
    assert x.dtype == weight.dtype, f"{x.dtype} with {weight.dtype}: the real operator takes it for packed int4"
    assert max(x.size(-1), weight.size(-1)) < 65536, f"documented: inner axes below 65536, {x.shape}, {weight.shape}"
    before = group_list.new_zeros(1)
    counts = group_list.tolist() if group_list_type == 1 else torch.diff(group_list, prepend=before).tolist()
    if group_type == 0:
        assert len(counts) == weight.size(0) and sum(counts) == x.size(0), f"{counts}, {x.shape}, {weight.shape}"
        return [torch.cat([a @ b for a, b in zip(x.split(counts), weight)])]
    assert group_type == 2 and sum(counts) == x.size(1) == weight.size(0), f"{group_type}, {counts}, {x.shape}"
    return [torch.stack([a @ b for a, b in zip(x.split(counts, 1), weight.split(counts))])]


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@operator('npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout,'
          ' Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1.,'
          ' int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None,'
          ' int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True,'
          ' bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0,'
          ' int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)')
def npu_fusion_attention(query, key, value, head_num, input_layout, atten_mask, scale, sparse_mode):
    """query, key (B,S,N,D), value (B,S,N,Dv). atten_mask: True is masked OUT; without it sparse_mode does nothing."""
    assert input_layout == "BSND" and query.size(2) == head_num <= 256, f"{input_layout}, {query.shape}, {head_num}"
    assert query.dtype == key.dtype == value.dtype, f"{query.dtype}, {key.dtype}, {value.dtype}"
    assert query.size(-1) == key.size(-1) >= value.size(-1), f"documented: Dq = Dk >= Dv, {query.shape}, {value.shape}"
    scores = scale * torch.einsum("bqnd,bknd->bnqk", at_least_float32(query), at_least_float32(key))
    masked_out = compressed_mask(atten_mask, sparse_mode, *scores.shape[-2:])
    if masked_out is not None:
        scores = scores.masked_fill(masked_out, float("-inf"))
    out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), at_least_float32(value)).to(query.dtype)
    empty = query.new_empty(0)
    return out, empty, empty, empty, 0, 0, 0


def compressed_mask(atten_mask, sparse_mode, queries, keys):
    """The mask that a sparse_mode stands for: 0, 1 the one given; 2, 3 causal, aligned top left or bottom right."""
    if atten_mask is None or sparse_mode in (0, 1):
        return atten_mask
    assert sparse_mode in (2, 3), sparse_mode
    causal = torch.ones(2048, 2048, dtype=torch.bool, device=atten_mask.device).triu(1)
    assert torch.equal(atten_mask.bool(), causal), "documented: modes 2 and 3 take a 2048 x 2048 upper triangle"
    shift = keys - queries if sparse_mode == 3 else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=atten_mask.device).triu(1 + shift)
