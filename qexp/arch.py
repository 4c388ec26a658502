"""Architecture descriptions: blocks, linears and norms of each supported model family."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import BertForSequenceClassification, PretrainedConfig, PreTrainedModel

from qexp.common.errors import UserError


class Group(NamedTuple):
    """Linears of a block that read the same tensor, and the module that produces it.

    `source` is the norm whose output is the input itself, or the linear for which scaling output
    row i scales the input's column i: value → output projection (rows repeat over the query heads
    that share a value head), up → down in a gated MLP, and fc1 → fc2 where the function between
    them is ReLU. None where neither exists: the input comes from another block, another
    nonlinearity lies between, or the values are fused with queries.
    All paths are relative to the block.
    """

    linears: tuple[str, ...]
    producer: str | None = None


@dataclass(frozen=True)
class Arch:
    """One family. Paths of `groups`, `writers` and `norms` are relative to a block, others full.

    `groups` are in execution order and name every linear of a block once; `norms` names every norm
    of a block. `writers` are the linears whose output is added to the residual stream. `head` maps
    the final hidden states to logits; `embeddings` produce the first block's input. `norm` is the
    final norm, None where the family has none. `pre_norm`: each branch adds writer(… norm(x)) to
    the residual stream x and nothing follows the writer, so norms can be folded and the stream
    rotated. `post_norm`: norms follow the residual sums. Their output is the stream itself, whose
    channels other branches also read. `unit_offset`: norms multiply by 1 + weight instead of
    weight. `parallel`: all branches of a block read its input. `expects_bos`: it was trained with
    BOS before every text and needs one, whatever its tokenizer does.
    """

    blocks: str
    groups: tuple[Group, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    norm: str | None
    head: str
    pre_norm: bool = True
    post_norm: bool = False
    unit_offset: bool = False
    parallel: bool = False
    expects_bos: bool = False

    @property
    def gated(self) -> bool:
        """The MLP multiplies its activation function by a second projection."""
        return len(self.groups[-2].linears) > 1

    @property
    def roles(self) -> dict[str, str]:
        """The linears of a block by their role: q, k, v (or qkv, where they are one matrix), o,
        gate (of a gated MLP), up, down."""
        inputs, (output,), middle, (down,) = (group.linears for group in self.groups)
        first = ("q", "k", "v") if len(inputs) == 3 else ("qkv",)
        between = ("gate", "up") if self.gated else ("up",)
        names = zip((*first, *between), (*inputs, *middle), strict=True)
        return {**dict(names), "o": output, "down": down}

    def linears_of(self, roles: Collection[str], key: str) -> set[str]:
        """The linears of a block that have one of these roles. UserError, naming `key`, for a role
        that this family has not."""
        if unknown := sorted(set(roles) - set(self.roles)):
            raise UserError(
                f"{key}: blocks of this family have no {' and no '.join(unknown)}; give some of "
                f"{', '.join(self.roles)}."
            )
        return {self.roles[role] for role in roles}


LLAMA = Arch(
    blocks="model.layers",
    groups=(
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Group(("self_attn.o_proj",), "self_attn.v_proj"),
        Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        Group(("mlp.down_proj",), "mlp.up_proj"),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
    embeddings=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
)

QWEN3 = replace(LLAMA, norms=(*LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"))

# Gemma 3 also normalizes each branch's output (`post_*`): folding cannot rotate its stream.
GEMMA3 = replace(
    QWEN3,
    groups=(
        *LLAMA.groups[:2],
        Group(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
        LLAMA.groups[3],
    ),
    norms=(*QWEN3.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    pre_norm=False,
    unit_offset=True,
    expects_bos=True,
)

OPT = Arch(
    blocks="model.decoder.layers",
    groups=(
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm"),
        Group(("self_attn.out_proj",), "self_attn.v_proj"),
        Group(("fc1",), "final_layer_norm"),
        Group(("fc2",)),
    ),
    writers=("self_attn.out_proj", "fc2"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    norm="model.decoder.final_layer_norm",
    head="lm_head",
)

# OPT-350m: norms follow the residual sums, there is no final norm, and `project_in` and
# `project_out` (parts of the embedding and of the decoder's end) resize a narrower embedding.
OPT_POST_NORM = replace(
    OPT,
    groups=(
        Group(OPT.groups[0].linears),
        OPT.groups[1],
        Group(("fc1",), "self_attn_layer_norm"),
        Group(("fc2",)),
    ),
    norm=None,
    pre_norm=False,
    post_norm=True,
)

ARCHS: dict[str, Arch] = {
    "gpt2": Arch(
        blocks="transformer.h",
        groups=(
            Group(("attn.c_attn",), "ln_1"),
            Group(("attn.c_proj",)),
            Group(("mlp.c_fc",), "ln_2"),
            Group(("mlp.c_proj",)),
        ),
        writers=("attn.c_proj", "mlp.c_proj"),
        norms=("ln_1", "ln_2"),
        embeddings=("transformer.wte", "transformer.wpe"),
        norm="transformer.ln_f",
        head="lm_head",
    ),
    "opt": OPT,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "gpt_neox": Arch(  # parallel in most models
        blocks="gpt_neox.layers",
        groups=(
            Group(("attention.query_key_value",), "input_layernorm"),
            Group(("attention.dense",)),
            Group(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
            Group(("mlp.dense_4h_to_h",)),
        ),
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        norms=("input_layernorm", "post_attention_layernorm"),
        embeddings=("gpt_neox.embed_in",),
        norm="gpt_neox.final_layer_norm",
        head="lm_head",
    ),
    "gemma3_text": GEMMA3,
    "gemma3": replace(  # the text model inside the vision-language model
        GEMMA3,
        blocks="model.language_model.layers",
        embeddings=("model.language_model.embed_tokens",),
        norm="model.language_model.norm",
    ),
    "bert": Arch(
        blocks="bert.encoder.layer",
        groups=(
            Group(("attention.self.query", "attention.self.key", "attention.self.value")),
            Group(("attention.output.dense",), "attention.self.value"),
            Group(("intermediate.dense",), "attention.output.LayerNorm"),
            Group(("output.dense",)),
        ),
        writers=("attention.output.dense", "output.dense"),
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        embeddings=("bert.embeddings",),
        norm=None,
        head="cls",
        pre_norm=False,
        post_norm=True,
    ),
    "vit": Arch(
        blocks="vit.layers",
        groups=(
            Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "layernorm_before"),
            Group(("attention.o_proj",), "attention.v_proj"),
            Group(("mlp.fc1",), "layernorm_after"),
            Group(("mlp.fc2",)),
        ),
        writers=("attention.o_proj", "mlp.fc2"),
        norms=("layernorm_before", "layernorm_after"),
        embeddings=("vit.embeddings",),
        norm="vit.layernorm",
        head="classifier",
    ),
}


def arch_of(model: PreTrainedModel) -> Arch:
    """The description of a model's family. Raises UserError for a family that has none."""
    config = model.config
    if config.model_type not in ARCHS:
        supported = ", ".join(sorted(ARCHS))
        raise UserError(
            f"model: family {config.model_type!r} is not supported; choose one of {supported}"
        )
    found = ARCHS[config.model_type]
    if config.model_type == "opt" and not config.do_layer_norm_before:
        found = OPT_POST_NORM
    if isinstance(model, BertForSequenceClassification):
        found = replace(found, head="classifier")  # reads the pooler's output
    found = replace(found, parallel=getattr(config, "use_parallel_residual", False))
    return found if found.gated else _through(found, config)


def _through(arch: Arch, config: PretrainedConfig) -> Arch:
    """ReLU passes positive factors on; no other function of these families does."""
    function = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    if function != "relu":
        return arch
    *others, first, second = arch.groups
    return replace(arch, groups=(*others, first, Group(second.linears, first.linears[0])))
