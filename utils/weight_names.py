"""How other projects name the tensors of a Vision Transformer, and what in their files may be left out.

One row of ORIGINS more, and the files of one project more are read. Names here are those of timm and DeiT: `cls_token,
pos_embed, patch_embed.proj, blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}, norm, head`; queries, keys and
values that a project keeps apart become attn.q, attn.k and attn.v, which `utils.weights` joins.
"""

from dataclasses import dataclass

# fmt: off
JEONSWORLD = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.hybrid_model\.(?:body\.)?", "patch_embed.stem."),
    (r"^(patch_embed\.stem\..*\.)downsample\.", r"\1conv_proj."),
    (r"^encoder\.encoder_norm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.ffn_addbias\.", ".bias2."),
    (r"\.addbias\.", ".bias1."),
    (r"(\.bias[12])\._bias$", r"\1.bias"),
    (r"(\.bias[12])\.init_mean$", r"\1.mean"),
    (r"^(blocks\.\d+)\._scale$", r"\1.scale"),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn\.(q)uery\.|\.attn\.(k)ey\.|\.attn\.(v)alue\.", r".attn.\1\2\3."),
    (r"\.attn\.out\.", ".attn.proj."),
)
GOOGLE = (  # '/' has become '.'
    (r"^cls$", "cls_token"),
    (r"^embedding\.", "patch_embed.proj."),
    (r"^(?:Transformer\.posembed_input\.)?pos_embedding$", "pos_embed"),
    (r"^Transformer\.encoder_norm\.", "norm."),
    (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
    (r"\.LayerNorm_0\.", ".norm1."),
    (r"\.LayerNorm_[12]\.", ".norm2."),  # 1 in big_vision
    (r"\.MultiHeadDotProductAttention_[01]\.", ".attn."),  # 0, and MlpBlock_0, in big_vision
    (r"\.attn\.(q)uery\.|\.attn\.(k)ey\.|\.attn\.(v)alue\.", r".attn.\1\2\3."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.MlpBlock_[03]\.Dense_0\.", ".mlp.fc1."),
    (r"\.MlpBlock_[03]\.Dense_1\.", ".mlp.fc2."),
    (r"^(conv|gn)_root\.", r"patch_embed.stem.root.\1."),
    (r"^block(\d)\.", r"patch_embed.stem.block\1."),
    (r"\.(?:kernel|scale)$", ".weight"),
)
HUGGING_FACE = (  # of files, and of models in memory
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.(?:(q)uery|(k)ey|(v)alue)\.", r".attn.\1\2\3."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^classifier\.", "head."),
)
TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.(?:(?:head|0)\.)?(?=weight|bias)", "head."),  # users put a Linear in its place, or into it
    (r"^heads\.", ""),
)
LUKEMELAS = (
    (r"^class_token$", "cls_token"),
    (r"^patch_embedding\.", "patch_embed.proj."),
    (r"^positional_embedding\.pos_embedding$", "pos_embed"),
    (r"^transformer\.blocks\.", "blocks."),
    (r"^(blocks\.\d+)\.proj\.", r"\1.attn.proj."),
    (r"\.attn\.proj_([qkv])\.", r".attn.\1."),
    (r"\.pwff\.", ".mlp."),
    (r"^fc\.", "head."),
)


@dataclass(frozen=True)
class Origin:
    """A project whose files are known by a tensor that only they have: `mark`, the end of its name.

    `names` are (pattern, replacement), one after the other, to the names here; `normalize` is a key of
    presets.NORMALIZE, where all of its files were trained with the same.
    """

    project: str
    mark: str
    names: tuple[tuple[str, str], ...] = ()
    normalize: str | None = None


ORIGINS = (
    Origin("jeonsworld/ViT-pytorch", "embeddings.patch_embeddings.weight", JEONSWORLD, "half"),
    Origin("Google", "embedding.kernel", GOOGLE, "half"),
    Origin("Hugging Face", "embeddings.patch_embeddings.projection.weight", HUGGING_FACE),
    Origin("torchvision", "encoder.pos_embedding", TORCHVISION, "imagenet"),
    Origin("PyTorch-Pretrained-ViT", "positional_embedding.pos_embedding", LUKEMELAS, "half"),
    Origin("timm", "patch_embed.proj.weight"),
)
# timm's names are also those of DeiT, and of these, known by other tensors in the same file.
PRETRAINED = (
    ("decoder_pos_embed", "MAE", "imagenet"), ("head.last_layer.", "DINO or iBOT", "imagenet"),
    ("base_encoder.", "MoCo-v3", "imagenet"),
)
# What no more than a file's own name says: enough for a hint.
FILE_NAMES = (
    (r"(?<![a-z])(deit|dino(v\d)?(?![a-z])|ibot|mae|moco|msn)", "imagenet"),
    (r"augreg|imagenet21k|in21k", "half"),
)

# Under which keys files keep their weights; averaged ones first, the better ones where there are both.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
PLAIN = ("model", "state_dict", "model_state_dict", "student", "net", "weights", "params", "module")

# LayerScale (arXiv 2103.17239) of a block's attention (1) and MLP (2), in timm, DINOv2 and Hugging Face; in DeiT-III.
LAYER_SCALE = r"^(blocks\.\d+)\.(?:ls([12])\.(?:gamma|lambda1)|gamma_([12]))$"
NORMS = r"^(?:blocks\.\d+\.)?(?:norm[12]?|bias[12])\.(?!running_)|^blocks\.\d+\.scale$"  # what --norm_type exchanges

# Tensors that change nothing of what a model computes.
HARMLESS = (
    r"^decoder[._]", r"^mask_token$", r"^masked_embed$",  # of pretraining by reconstruction
    r"^(?:base_encoder|momentum_encoder|student|teacher)\.",  # other networks of a pretraining
    r"^n_averaged$",  # of torch's AveragedModel
)
# What fine-tuning does without, as in the published implementations: layers before a head.
HARMLESS_AT_FINE_TUNING = (r"^(?:pre_logits|pooler|predictor|projector)\.",)
# fmt: on
