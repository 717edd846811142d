"""train.py with two models of others, so that model and recipe alone differ in a race to an accuracy.

    python benchmarks/peers.py --model_type timm-ViT --dim 128 --depth 6 --heads 4 --mlp_dim 512 --dataset cifar10 ...
    python benchmarks/peers.py --model_type CCT-2_3x2 --dataset cifar10 --img_size 32 ...

`timm-ViT` is timm's VisionTransformer; `CCT-2_3x2`, of Compact Transformers (arXiv 2104.05704), is lucidrains'.
"""

import sys

from common import timm_vit
from vit_pytorch.cct import cct_2

import train
from models import MODELS
from utils import cli, dist_util, options


def cct(image_size, num_classes, patch_size, dropout=0.0, attn_drop=0.1, drop_path=0.1):
    """Two convolutions to 8x8 tokens of 128 features, two blocks; 283,723 parameters for CIFAR-10."""
    return cct_2(
        img_size=image_size, num_classes=num_classes, kernel_size=3, n_conv_layers=2, dropout_rate=dropout,
        attention_dropout=attn_drop, stochastic_depth_rate=drop_path, positional_embedding="learnable",
    )  # fmt: skip


PEERS = {
    "timm-ViT": dict(cls=timm_vit, patch_size=4, dim=192, depth=12, heads=3, mlp_dim=768),
    "CCT-2_3x2": dict(cls=cct, patch_size=4),
}


def main(words: list[str]) -> int:
    MODELS.update(PEERS)
    return train.main(options.parse_train_args(words))


if __name__ == "__main__":
    cli.run_main(main, sys.argv[1:], dist_util.explain, dist_util.stop)
