"""Vision Transformer with BatchNorm, GroupNorm or no normalisation (Rescale), after ChaofanTao/RescaleViT.

Differs from ViT in the norms alone. BN and GN stand in for every LayerNorm. Rescale has no norm at all: a learned bias,
centred by the mean of its first inputs, before attention and MLP, and an MLP residual scaled down with the depth.
Published top-1 on CIFAR-10, ViT-B_32 at 224 px from scratch: LN 67.6, BN 67.1, GN 65.5, Rescale 66.1.

    RescaleViT(norm_type="GN", image_size=32, patch_size=4, num_classes=10, dim=192, depth=12, heads=3, mlp_dim=768)
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """`F.dropout`; on a CPU from 16 random bits an element, at a fifth of the time that torch takes for its mask."""
    if p == 0.0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape).ge_(round(p * 2**16) - 2**15)
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def drop_path(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Drop whole samples of a residual branch with probability p (stochastic depth, arXiv 1603.09382)."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - p)
    return x * keep / (1 - p)


class PatchEmbed(nn.Module):
    """Image (b, c, h, w) -> tokens (b, n, d): a convolution with kernel = stride = patch."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return rearrange(self.proj(x), "b d h w -> b (h w) d")
        # As one product: a CPU's gradient of this convolution takes up to a fifth of a whole ViT-B_32 step.
        p, q = self.proj.kernel_size
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    """Scaled dot-product attention of queries (b, h, n, d) over keys and values (b, h, m, d)."""
    # In bfloat16 a CPU trains it 2 to 7 times faster as plain products; otherwise torch chooses the kernel.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        b, scale = q.shape[0], q.shape[-1] ** -0.5
        q, k, v = (rearrange(x, "b h n d -> (b h) n d") for x in (q, k, v))
        weights = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale).softmax(dim=-1)
        return rearrange(dropout(weights, dropout_p, True) @ v, "(b h) n d -> b h n d", b=b)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Attention after the softmax, (b, heads, n, n)."""
        q, k, _ = self.split_heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(x)
        x = attend(q, k, v, self.attn_drop if self.training else 0.0)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between, dropout after both."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)


class BatchNorm(nn.Module):
    """BatchNorm of tokens (b, n, d): each feature over batch and tokens.

    Parameters sit under `layer`, as in the published files, so that no LayerNorm's weights load into it by name.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.layer = nn.BatchNorm1d(dim, eps=1e-6, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.layer(rearrange(x, "b n d -> (b n) d")), "(b n) d -> b n d", b=x.shape[0])


class GroupNorm(nn.Module):
    """GroupNorm of tokens (b, n, d): four groups of features, each over all tokens of one image; see BatchNorm."""

    groups = 4

    def __init__(self, dim: int):
        super().__init__()
        self.layer = nn.GroupNorm(self.groups, dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.layer(rearrange(x, "b n d -> b d n 1")), "b d n 1 -> b n d")  # channels last: no copy


class CentredBias(nn.Module):
    """Tokens (b, n, d) -> x + bias - mean, where `mean` averages the inputs of the first 8 training passes.

    During those passes, and in evaluation before they are over, the bias counts 1/100.
    """

    warmup = 8

    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("mean", torch.zeros(1, 1, dim))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warm = self.count < self.warmup  # a tensor throughout: a Python branch on it would wait for the device
        factor = torch.where(warm, 0.01, 1.0)
        if self.training:
            batch_mean = x.detach().float().mean(dim=(0, 1), keepdim=True)
            mean = (self.mean * self.count + batch_mean) / (self.count + 1)
            self.mean.copy_(torch.where(warm, mean, self.mean))
            self.count.add_(warm)
        return x + (factor * self.bias - self.mean)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, norm: type, dim: int, heads: int, mlp_dim: int, dropout: float, attn_drop: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = Attention(dim, heads, attn_drop)
        self.norm2 = norm(dim)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class RescaleBlock(nn.Module):
    """x + attention(bias(x)), then sqrt(i / (i + 1)) x + scale / sqrt(depth) mlp(bias(x)); i counts blocks from 1."""

    def __init__(
        self, index: int, depth: int, dim: int, heads: int, mlp_dim: int, dropout: float, attn_drop: float,
        drop_path: float,
    ):  # fmt: skip
        super().__init__()
        self.bias1 = CentredBias(dim)
        self.attn = Attention(dim, heads, attn_drop)
        self.bias2 = CentredBias(dim)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.scale = nn.Parameter(torch.ones(1))
        self.branch = depth**-0.5
        self.shortcut = (index / (index + 1)) ** 0.5
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + drop_path(self.attn(self.bias1(x)), self.drop_path, self.training)
        branch = self.scale * self.branch * self.mlp(self.bias2(x))
        return self.shortcut * x + drop_path(branch, self.drop_path, self.training)


class RescaleViT(nn.Module):
    """Vision Transformer with `norm_type` 'BN', 'GN' or 'Rescale' instead of LayerNorm ('LN' is ViT itself).

    The other arguments are ViT's. ValueError: sizes that don't divide, or an unknown norm.
    """

    def __init__(
        self, *, norm_type: str, image_size: int | tuple[int, int], patch_size: int, num_classes: int, dim: int,
        depth: int, heads: int, mlp_dim: int, channels: int = 3, dropout: float = 0.1, attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            shown = height if height == width else f"{height}x{width}"
            raise ValueError(f"image size {shown} is not divisible by patch size {patch_size}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if norm_type not in ("BN", "GN", "Rescale"):
            raise ValueError(f"unknown norm type {norm_type!r}, one of BN GN Rescale")
        if norm_type == "GN" and dim % GroupNorm.groups:
            raise ValueError(f"dim {dim} is not divisible by {GroupNorm.groups}, as GN needs")
        self.image_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.dropout = dropout
        self.blocks = nn.ModuleList()
        norm = {"BN": BatchNorm, "GN": GroupNorm}.get(norm_type)
        for i in range(depth):
            sizes = (dim, heads, mlp_dim, dropout, attn_drop, drop_path * i / max(1, depth - 1))
            self.blocks.append(Block(norm, *sizes) if norm else RescaleBlock(i + 1, depth, *sizes))
        self.norm = norm(dim) if norm else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """As published, but that class token and positions are 0 there; what isn't named here keeps torch's default."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for fc in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(fc.weight)
                nn.init.normal_(fc.bias, std=1e-6)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves out."""
        return {"cls_token", "pos_embed"}

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> class token and patch tokens with their positions, (b, 1 + n, d)."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f"the image is {x.shape[-2]}x{x.shape[-1]}, the model expects {self.image_size}")
        cls = repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0])
        return dropout(torch.cat([cls, self.patch_embed(x)], dim=1) + self.pos_embed, self.dropout, self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> tokens after the last norm (Rescale: after the last block), (b, 1 + n, d)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> logits (b, num_classes)."""
        return self.head(self.forward_features(x)[:, 0])

    @torch.no_grad()
    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """As ViT's."""
        training = self.training
        self.eval()
        x = self.embed(x)
        maps = []
        for block in self.blocks:
            before = block.bias1 if isinstance(block, RescaleBlock) else block.norm1
            maps.append(block.attn.weights(before(x)))
            x = block(x)
        self.train(training)
        return torch.stack(maps, dim=1)

    def token_layout(self) -> dict:
        """Where tokens stand in `attention_maps`, their positions and filters; see models/__init__.py."""
        first = next(module for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d))
        name = "patch embedding" if first is self.patch_embed.proj else "patch embedding, first convolution"
        filters = name, first.weight.view(first.out_channels, first.in_channels, *first.kernel_size)
        positions = self.pos_embed[0, 1:]
        patches = dict(name="patches", grid=self.grid, first=0, start=1, positions=positions, filters=filters)
        return dict(class_token=0, scales=[patches])
