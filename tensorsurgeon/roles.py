"""Roles of tensors: what each one does in its model, which way round it lies on disk, and what is fused in it.

Names decide, by an ordered table of rules; shapes and the model type only where one name means two things.
What no rule knows has the group "other": nothing is guessed.

Source: the model classes of transformers 5.19, and its conversion_mapping.py for names on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from tensorsurgeon.config import Config, config_parts, text_config_path
from tensorsurgeon.names import COMPANION, LayerStack, is_tower, layer_name

Shape = tuple[int, ...]


class Role(NamedTuple):
    """What a tensor does.

    Attributes:
        group: attention, mixer (of tokens, without softmax: state spaces, linear attention, convolutions), mlp,
            expert, router, norm, embedding, head, or other.
        part: q, k, v, gate, up, in, conv, ... What is added to the residual stream is `o` or `down`; `gate` is what the
            activation is applied to, and the first matrix of an MLP without one is `up`. Fused parts are named in
            their order (`qkv`), a norm after what it is for (q, kv_a, embedding, head, final), or as its module is.
        kind: weight, bias, or companion (a tensor that holds or describes a quantised weight).
        layout: the dimensions of a plain weight: "out,in" (nn.Linear) or "in,out" (Conv1D of GPT-2); after "expert,"
            where experts are stacked, and after "expert*" where they are stacked row by row. Empty if unknown.
        fused: how fused parts share the output dimension: "blocks" (one after the other), "interleaved" (a row of
            each in turn), "per head", or "per group" (query heads, then their key and value). Empty if unknown.
        mark: "shared" (an expert for every token), "cross" (attention to another sequence), "indexer" (of sparse
            attention), or empty.
        suffix: what follows the module's name, such as ".weight_scale_inv"; empty for bare parameters.
    """

    group: str
    part: str = ""
    kind: str = "weight"
    layout: str = ""
    fused: str = ""
    mark: str = ""
    suffix: str = ""


class _Rule(NamedTuple):
    module: str
    role: Role
    models: str
    kind: str


def _rules(group: str, path: str, parts: str, mark: str = "", layout: str = "", kind: str = "") -> list[_Rule]:
    """Return rules for modules of a group: `path` followed by names, both regular expressions.

    `parts` lists `part=names`, with `/fused` and `@model types` behind where they matter; a part "-" is called as
    its module. The layout "?" is found by the shape. With `kind`, the rules hold for that kind only.
    """
    found = re.findall(r"([\w-]+)=([^\s/@]+)(?:/(\S+?))?(?:@(\S+))?(?:\s|$)", parts)
    return [
        _Rule(f"(?:{path})(?:{names})", Role(group, part, "", layout, fused.replace("-", " "), mark), models, kind)
        for part, names, fused, models in found
    ]


_SUFFIX = re.compile(
    rf"(?P<module>.+?)(?:(?P<weight>[._]weight|\.gamma)|(?P<bias>[._]bias|\.beta)|(?P<companion>{COMPANION}))?"
)

_TOWERS = {
    "mtp": r"(^|\.)mtp",
    "audio": r"audio|speech|talker|code2wav",
    "projector": r"projector|connector|aligner|merger|resampler|mlp_AR|(^|\.)mlp1\.|merge_mlp|language_projection",
    "vision": r"vision|visual|image|video|sam_model|vqmodel|qformer|perceiver|patch_embed",
    "tower": r"protein_encoder|generation_|gemma_expert",
}
"""What does not belong to the language model, by the name outside of layers; the first that fits."""

_ANY = r"(?:.+\.)?"
_BLOCK = r"(?:shared_transformer\.|norm_attn_norm\.)?"
_ATTENTION = (
    _BLOCK + r"(?:self_attn|attn|attention|self_attention|self_att|multi_head_attention|layer\.N\.\w*SelfAttention)"
    r"(?:\.N|\.self|\.attn|\.attention|\.self_attention|\.qkv_proj|\.output_projection)?\."
)
_CROSS = (
    r"(?:encoder_attn|cross_attn|cross_?attention|encoder_decoder_attention|layer\.N\.EncDecAttention)"
    r"(?:\.self|\.attention)?\."
)
_QKVO = (
    r" q=q|(?:q_proj|to_q|q_lin|query|query_proj|[Ww]q|wq_du|project_q)(?:\.linear)?"
    r" k=k|(?:k_proj|to_k|k_lin|key|key_proj|[Ww]k|wk_dv|project_k)(?:\.linear)?"
    r" v=v|(?:v_proj|to_v|v_lin|value|value_proj|[Ww]v|wv_dv|project_v)(?:\.linear)?"
    r" o=o|(?:o_proj|to_out|out_lin|out_proj|dense|[Ww]o|wo_ud|attention_out|proj|output)(?:\.linear)?"
)
_MAMBA = r"(?:mamba_decoder\.)?(?:mamba|mixer)\."
_MLP = _BLOCK + r"(?:mlp|mlps\.N|feed_forward|ffn|ff|mlp_block|block_sparse_moe|mixer|ffn\.ffn)\."
_T5 = r"(?:layer\.N\.)?(?:mlp\.)?(?:DenseReluDense\.)?"
_MOE = r"(?:mlp|block_sparse_moe|feed_forward|ffn|mixer|moe)\."
_SHARED = rf"(?:{_MOE})?(?:shared_experts?|share_expert|shared_mlp)\."
_EXPERTS = rf"(?:{_MOE})?experts\."

_INSIDE = (
    *_rules("norm", _ANY, " ".join(rf"{p}={p}_(?:layer_?)?norm|norm_{p}" for p in ("q", "k", "v", "q_a", "kv_a"))),
    *_rules("norm", _ANY, r"-=(?i:\w*norm\w*|(?:\w+_)?ln(?:_?\d)?)(?:\.N)?"),
    *_rules("other", "", r"""
        mtp=eh_proj|shared_head\.head|embed_tokens altup=altup\..+ laurel=laurel\..+ layer_scale=layer_scalar
        per_layer=per_layer_input_gate|per_layer_projection hyper_connection=hc_\w+(?:\..+)?"""),
    *_rules("embedding", _ANY, r"position=relative_attention_bias"),
    *_rules("mixer", r"attention\.", r"k=key@rwkv v=value@rwkv o=output@rwkv r=receptance@rwkv time=time_\w+@rwkv"),
    *_rules("mlp", r"feed_forward\.", r"up=key@rwkv down=value@rwkv r=receptance@rwkv time=time_\w+@rwkv"),
    # What mixes tokens without softmax.
    *_rules("attention", r"mixer\.", r"qkv=Wqkv/blocks o=out_proj@jina_embeddings_v3|xlm-roberta"),
    *_rules("mixer", _MAMBA, r"in=in_proj/blocks conv=conv1d x=x_proj/blocks dt=dt_proj A=A_log D=D o=out_proj"),
    *_rules("mixer", _MAMBA + r"|linear_attn\.|self_attn\.", "dt=dt", kind="bias"),
    *_rules("mixer", r"conv\.", r"in=in_proj/blocks conv=conv o=out_proj"),
    *_rules("mixer", r"linear_attn\.", r"""
        qkvz=in_proj_qkvz/per-group ba=in_proj_ba/per-group qkv=in_proj_qkv/blocks z=in_proj_z|g_proj q=q_proj k=k_proj
        v=v_proj a=in_proj_a|a_proj b=in_proj_b|b_proj o=o_proj|out_proj"""),
    *_rules("mixer", r"self_attn\.", r"f_a=f_a_proj f_b=f_b_proj g_a=g_a_proj g_b=g_b_proj b=b_proj"),
    *_rules("mixer", r"(?:linear_attn|self_attn)\.", r"conv=(?:[qkv]_)?conv1d A=A_log"),
    *_rules("mixer", r"mlstm_layer\.", r"q=q k=k v=v gate=[fio]gate_preact o=out_proj"),
    *_rules("mixer", r"temporal_block\.", r"x=linear_x y=linear_y conv=conv_1d o=linear_out gate=rg_lru\.\w+"),
    # Attention.
    *_rules("attention", _ATTENTION + r"indexer\.", r"q=wq_b k=wk head=weights_proj", mark="indexer"),
    *_rules("attention", _ATTENTION, r"""
        q_a=q_a_proj|wq_a q_b=q_b_proj|wq_b kv_a=kv_a_proj(?:_with_mqa)?/blocks kv_b=kv_b_proj/per-head kv=wkv o_a=wo_a
        kv=kv_proj/blocks o=wo_b qkv=qkv_proj/per-head@minimax qvk=qkv_proj@codegen qkv=qkv_proj|Wqkv|W_pack/blocks
        qkv=wqkv/per-group@internlm2.* qkv=query_key_value/blocks@chatglm qkv=in_proj/per-head@deberta
        qkv=query_key_value/per-head@gpt_neox.*|bloom|persimmon|fuyu qkv=query_key_value/per-group@falcon|RefinedWeb.*
        qkv=query_key_value|qkv|wqkv q=q_proj/per-head@qwen3_next|qwen3_5\w* gqkv=gqkv_proj/blocks
        gate=g_proj|gate_proj|output_gate|linear_gate sinks=sinks|attn_sink|attention_sink|learnable_sink_param"""),
    *_rules("attention", _ATTENTION, r"qkv=c_attn/? o=c_proj", layout="?"),
    *_rules("attention", _ATTENTION, _QKVO),
    *_rules("attention", r"(?:mixer|temporal_block)\.", r"q=q_proj k=k_proj v=v_proj o=o_proj"),
    *_rules("attention", r"self_attn", r"cache=(?:\.attn)?", kind="companion"),
    *_rules("attention", _ATTENTION + r"experts\.", r"q=input_linear o=output_linear", layout="expert,out,in"),
    *_rules("attention", _CROSS, _QKVO, mark="cross"),
    *_rules("attention", "", r"o=attention\.output\.dense"),
    *_rules("attention", "", r"o=crossattention\.output\.dense gate=cross_attn_attn_gate", mark="cross"),
    *_rules("mlp", "", r"gate=cross_attn_mlp_gate", mark="cross"),
    # Routers.
    *_rules("router", _MOE, r"correction=(?:gate\.|router\.|experts\.|moe_statics\.)?(?:e_score_correction|expert)"),
    *_rules("router", _MOE, r"correction=gate@deepseek_v4|inkling.* correction=router@step.*", kind="bias"),
    *_rules("router", _MOE, r"router=gate|gate\.wg|router|router\.(?:layer|gate|classifier) shared=shared_expert_gate"),
    *_rules("router", r"(?:self_attention\.experts\.)?router\.", r"router=layer|proj scale=\w*scale"),
    # Experts, one by one, stacked, and those for every token.
    *_rules("mlp", _SHARED, r"""
        gate=gate_proj|w1|linear_gate up=up_proj|w3 down=down_proj|w2|output_linear|shared_w2 gate_up=shared_w13
        gate_up=gate_up_proj|input_linear/blocks""", mark="shared"),
    *_rules("expert", _EXPERTS, r"""
        gate_up=gate_up_proj/interleaved@gpt_oss|openai_privacy_filter gate_up=gate_up_proj/blocks
        gate_up=fc1/blocks@aria\w* down=fc2@aria\w*"""),
    *_rules("expert", _EXPERTS + r"(?:N\.)?|moe\.", r"gate=gate_proj|w1 up=up_proj|w3 down=down_proj|w2 gate_up=w13"),
    *_rules("expert", _MOE, r"gate_up=input_linear/blocks down=output_linear", layout="expert,out,in"),
    *_rules("expert", r"ffn\.experts\.mlp\.", r"gate=w1 up=v1", layout="expert*out,in"),
    *_rules("expert", r"ffn\.experts\.mlp\.", r"down=w2", layout="expert*in,out"),
    # Dense MLPs.
    *_rules("mlp", _MLP, r"""
        gate_up=fc1/blocks@moshi gate_up=dense_h_to_4h/blocks@chatglm gate=w2@qwen up=w1@qwen gate=linear_gate
        gate_up=gate_up_proj|Wi/blocks up_gate=up_gate_proj/blocks gate=gate_proj|w1|fc12|w_in\.w_0|proj_up_gate
        up=up_proj|w3|fc11?|fc_in|dense_h_to_4h|(?:lin|linear_fc|layer_)1|w_in\.w_1|proj_up|intermediate
        down=down_proj|w2|fc2|fc_out|dense_4h_to_h|(?:lin|linear_fc|layer_)2|w_out|proj_down|Wo|output"""),
    *_rules("mlp", _MLP, r"up=c_fc down=c_proj", layout="?"),
    *_rules("mlp", _T5, r"gate=wi_0 up=wi_1|wi down=wo"),
    *_rules("mlp", "", r"up=(?:ffn\.)?fc1|intermediate\.dense down=(?:ffn\.)?fc2|output\.dense"),
)  # fmt: skip
"""Rules for the tensors of a layer: `N` stands for any number, and the first that fits a whole name is right."""

_OUTSIDE = (
    *_rules("norm", _ANY, r"""
        embedding=\w*embed\w*\.\w*(?i:norm)|\w*embeddings_(?:layer_?)?norm|embed_norm|layernorm_embedding|emb_ln
        head=(?:\w*head|\w*predictions|predictions\.transform|vocab)[._]\w*(?i:norm)
        final=(?i:(?:final_|out_|output_|embedding_)?(?:layer_?)?norm)|norm_f|ln_f|ln_out|ln -=(?i:\w*norm\w*)"""),
    *_rules("embedding", _ANY, r"""
        per_layer=embed_tokens_per_layer segment=token_type_embeddings(?:_\d)?|segment_embedding
        position=wpe|embed_positions|positions_embed|\w*position_embeddings|relative_attention_bias
        token=wte|embed_tokens|tok_embeddings|tokens_embed|word_embeddings?|embed_in|shared|input_embedding|llm\.embed"""),
    *_rules("embedding", r"(?:model|backbone|rwkv|transformer)\.|language_model\.backbone\.", r"token=embeddings|w"),
    *_rules("head", "", r"""
        transform=vocab_transform score=score|classifier lm_head=head|output|decoder|proj_out|output_projection|lm_loss
        lm_head=(?:transformer\.)?output_layer"""),
    *_rules("head", _ANY, r"""
        transform=(?:head|lm_head|predictions|predictions\.transform|generator_predictions)\.dense
        lm_head=(?:\w+_)?lm_head(?:\.decoder|\.out_proj)?|(?:cls\.)?predictions(?:\.decoder)?
        lm_head=embed_out|vocab_projector|pred_layer\.proj|llm\.unembed"""),
    *_rules("other", _ANY, r"altup=altup_\w+\.N per_layer=per_layer_model_projection hyper_connection=hc_head\.\w+"),
)  # fmt: skip
"""Rules for the tensors outside of all layers."""

_BY_TYPE = (
    (r"gpt2|gpt-sw3|openai-gpt|imagegpt|decision_transformer", "in,out"),
    (r"gpt_oss|openai_privacy_filter|llama4(_text)?|qwen3_vl_moe(_text)?|aria(_text)?", "in,out"),
    (r"gpt_bigcode|qwen|granitemoe\w*|qwen3_5_moe(_text)?|gemma4(_text)?|minimax_m3_vl(_text)?|hy_v4", "out,in"),
)
"""The layout of the names that have no fixed one, by model type, for where the shape fits both ways."""

_READERS = ("qkv", "gate", "up", "gate_up")
_LINEAR_ATTENTION = re.compile(r"(.*\.self_attn\.)(?:A_log|q_conv1d\.weight|output_gate\.weight)")
_SELF_ATTENTION = re.compile(r".*\.self_attn\.")


def find_roles(shapes: Mapping[str, Shape], config: Config, stack: LayerStack | None = None) -> dict[str, Role]:
    """Return the role of every tensor of a checkpoint, by their names and shapes on disk.

    Neighbours tell what a name alone does not: linear attention that is called `self_attn`, and the layers of
    multi-token prediction. With `stack`, the layers of any other stack are "other".
    """
    parts = list(config_parts(config, text_config_path(config)))[::-1]
    model_type = next((part["model_type"] for part in parts if part.get("model_type")), "")
    hidden = hidden_size(config)
    linear = {match[1] for match in map(_LINEAR_ATTENTION.fullmatch, shapes) if match}
    layers = {name: layer_name(name) for name in shapes}
    extra = {(at.prefix, at.index) for at in layers.values() if at and at.rest.startswith("eh_proj.")}
    roles = {name: find_role(name, shape, model_type, hidden) for name, shape in shapes.items()}
    for name, role in roles.items():
        at = layers[name]
        owner = _SELF_ATTENTION.match(name) if linear and role.group == "attention" else None
        if owner and owner[0] in linear:
            roles[name] = role._replace(group="mixer")
        if at and role.group != "other" and ((at.prefix, at.index) in extra or (stack and at.prefix != stack.prefix)):
            part = "mtp" if (at.prefix, at.index) in extra else "tower"
            roles[name] = Role("other", part, role.kind, suffix=role.suffix)
    return roles


def hidden_size(config: Config) -> int | None:
    """Return the width of the language model's residual stream, where its config tells."""
    parts = list(config_parts(config, text_config_path(config)))[::-1]
    keys = ("hidden_size", "n_embd", "d_model", "dim")
    return next((part[key] for part in parts for key in keys if isinstance(part.get(key), int)), None)


def find_role(name: str, shape: Shape, model_type: str = "", hidden: int | None = None) -> Role:
    """Return the role of one tensor; `model_type` and `hidden` size are those of the language model."""
    at = layer_name(name)
    rest = at.rest if at else name
    match = _SUFFIX.fullmatch(rest)
    if match is None:  # An empty name, or one with line breaks.
        return Role("other")
    kind = "companion" if match["companion"] else "bias" if match["bias"] else "weight"
    suffix = rest[match.end("module") :]
    tower = _tower(at.prefix if at else name)
    module = re.sub(r"\.\d+(?=\.|$)", ".N", match["module"])
    role = None if tower else _find_rule(module, kind, bool(at), model_type)
    if role is None or (role.group == "norm" and len(shape) > 1):
        return Role("other", tower, kind, suffix=suffix)
    part = module.removesuffix(".N").rpartition(".")[2] if role.part == "-" else role.part
    layout = _layout(role, shape, model_type, hidden) if kind == "weight" else ""
    fused = role.fused
    if fused == "?":  # GPT-BigCode has heads one after the other, but for a single key and value for all of them.
        fused = "per head" if model_type == "gpt_bigcode" and shape[0] == 3 * (hidden or 0) else "blocks"
    return role._replace(part=part, kind=kind, layout=layout, fused=fused, suffix=suffix)


@lru_cache(maxsize=8192)
def _tower(name: str) -> str:
    """Return the part of the model, other than the language model, that a name belongs to, or nothing."""
    found = next((tower for tower, pattern in _TOWERS.items() if re.search(pattern, name)), "")
    return found or ("tower" if is_tower(name) else "")


@lru_cache(maxsize=8192)
def _find_rule(module: str, kind: str, inside: bool, model_type: str) -> Role | None:
    for rule in _INSIDE if inside else _OUTSIDE:
        known = rule.kind in ("", kind) and (not rule.models or re.fullmatch(rule.models, model_type))
        if known and re.fullmatch(rule.module, module):
            return rule.role
    return None


def _layout(role: Role, shape: Shape, model_type: str, hidden: int | None) -> str:
    """Return the layout of a weight; where its name leaves that open, the side of the hidden size shows it."""
    linear = role.group in ("attention", "mixer", "mlp", "expert", "router", "head") and role.part not in ("A", "time")
    if len(shape) == 2 and linear and role.layout != "?":
        return (role.layout or "out,in") if shape[1] > 1 else ""  # bitsandbytes packs codes in a single column.
    stacked = len(shape) == 3 and (role.group == "expert" or role.mark == "shared" or role.layout.startswith("expert"))
    if not stacked and (len(shape) != 2 or role.layout != "?"):
        return ""
    layout = role.layout.removeprefix("expert,").strip("?")
    if not layout and hidden in shape[-2:] and shape[-1] != shape[-2]:
        layout = "out,in" if (shape[-1] == hidden) == (role.part in _READERS) else "in,out"
    layout = layout or next((layout for types, layout in _BY_TYPE if re.fullmatch(types, model_type)), "")
    return f"expert,{layout}" if stacked and layout else layout
