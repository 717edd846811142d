"""DEMS-ViT: patches of four sizes, gathered and merged region by region (Tang, Liu, Shen 2024, Pattern Recognition 161,
111305).

Differs from ViT in: tokens of patch sides p, 2p, 4p and 8p of the same image, the larger two through depthwise
convolutions; fixed sin-cos positions; a sequence sorted by regions, one for each 8p patch with the 85 tokens inside it;
two merges on the way through the blocks, which leave each region fewer tokens; qkv without bias, LayerNorm eps 1e-5.
Parameter names follow the published weight files.

Trained parameters at 32 px, patch 2, 10 classes: DEMS-Ti 5,582,888; DEMS-S 22,218,504. Published top-1 on CIFAR-10:
96.03 and 96.20, fine-tuned 96.74 and 97.76.

    DEMS(image_size=32, patch_size=2, num_classes=10, dim=192, depth=12, heads=3, mlp_dim=768)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
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


def sincos_2d(grid: tuple[int, int], dim: int) -> torch.Tensor:
    """Rows as sines and cosines at frequencies 10000^(-k / (d/4)), then columns; (1, rows * columns, d)."""
    omega = 10000.0 ** (-torch.arange(dim // 4) / (dim / 4))
    rows, columns = (torch.outer(torch.arange(side).float(), omega) for side in grid)
    rows = repeat(rows, "h k -> h w k", w=grid[1])
    columns = repeat(columns, "w k -> h w k", h=grid[0])
    table = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1)
    return rearrange(table, "h w d -> 1 (h w) d")


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


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with GroupNorm (one group) and GELU, in place of most of the patch embedding.

    After 'Early Convolutions Help Transformers See Better' (Xiao et al. 2021, arXiv 2106.14881), with a norm that keeps
    images apart. (b, channels, h, w) -> (b, dim, h / patch_size, w / patch_size); channels double up to dim on the way.
    """

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.stride, self.out_channels = patch_size, dim
        layers = []
        for i in reversed(range(patch_size.bit_length() - 1)):
            width = max(1, dim >> i)
            layers += self.stage(channels, width)
            channels = width
        self.layers = nn.Sequential(*layers)

    def stage(self, channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.GELU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class ConvPatchEmbed(PatchEmbed):
    """Image (b, c, h, w) -> tokens (b, n, d): a conv stem, then a 1x1 convolution."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__(dim, dim, 1)
        self.stem = ConvStem(channels, dim, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.stem(x))


class DepthwisePatchEmbed(PatchEmbed):
    """The same through depthwise convolutions of strides patch / 4 and 4, then a 1x1 one; for the larger patches."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        nn.Module.__init__(self)
        side = patch_size // 4
        self.proj = nn.Sequential()
        self.proj.add_module("proj-1", nn.Conv2d(channels, channels, side, side, groups=channels, bias=False))
        self.proj.add_module("proj-2", nn.Conv2d(channels, channels, 4, 4, groups=channels, bias=False))
        self.proj.add_module("point_wise", nn.Conv2d(channels, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")

    def kernel(self) -> torch.Tensor:
        """The kernel (dim, channels, patch, patch) of the one convolution that the three amount to."""
        fine, coarse, mix = (module.weight for module in self.proj)  # (c, 1, s, s), (c, 1, 4, 4), (d, c, 1, 1)
        both = [torch.kron(outer[0], inner[0]) for outer, inner in zip(coarse, fine, strict=True)]
        return mix * torch.stack(both)


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
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Attention after the softmax, (b, heads, n, n)."""
        q, k, _ = self.split_heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        q, k, v = self.split_heads(x)
        x = attend(q[:, :, :queries], k, v, self.attn_drop if self.training else 0.0)
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `queries`, of the first so many tokens alone."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float, attn_drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        x = x[:, :queries] + drop_path(self.attn(self.norm1(x), queries), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class Merge(nn.Module):
    """Merge the tokens of each region into `num` weighted means of them; the class token stays."""

    def __init__(self, dim: int, num: int, regions: int):
        super().__init__()
        self.regions = regions
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim // 2)
        self.fc3 = nn.Linear(dim // 2, num)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1))

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Regions' tokens (b, r, n, d) -> the share of each in each mean, (b, r, n, num); sums to 1 over n."""
        x = F.gelu(self.fc2(F.gelu(self.fc1(self.norm(x)))))
        return (self.scale * self.fc3(x)).softmax(dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 1 + r n, d) -> (b, 1 + r num, d)."""
        tokens = rearrange(x[:, 1:], "b (r n) d -> b r n d", r=self.regions)
        merged = einsum(self.weights(tokens), tokens, "b r n m, b r n d -> b r m d")
        return torch.cat([x[:, :1], rearrange(merged, "b r m d -> b (r m) d")], dim=1)


class DEMS(nn.Module):
    """Vision Transformer over patches of four sizes, merged region by region.

    Args, where they are not as ViT's:
        image_size, patch_size: sides in pixels, of the image (a multiple of 8 patches) and of the smallest patch.
        merge_num, merge_layer: tokens that each region keeps at each merge; the blocks, from 1, that it comes before.
        conv_stem: a `ConvStem` for the smaller two patches; patch_size is a power of 2.

    ValueError: sizes that don't divide, or merges that don't fit.
    """

    scales = (8, 4, 2, 1)  # patches along the side of a region
    region = sum(side**2 for side in scales)  # 85 tokens
    fixed = ("pos_embed", "pos_embed_2", "pos_embed_4", "pos_embed_8")

    def __init__(
        self, *, image_size: int | tuple[int, int], patch_size: int, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, merge_num: Sequence[int] = (64, 64), merge_layer: Sequence[int] = (6, 10),
        channels: int = 3, dropout: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0,
        conv_stem: bool = False,
    ):  # fmt: skip
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % (8 * patch_size) or width % (8 * patch_size):
            shown = height if height == width else f"{height}x{width}"
            raise ValueError(f"image size {shown} is not divisible by {8 * patch_size}, 8 x patch size {patch_size}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if dim % 4:
            raise ValueError(f"dim {dim} is not divisible by 4, as DEMS needs")
        if len(merge_num) != len(merge_layer):
            raise ValueError(f"merge_num has {len(merge_num)} counts for {len(merge_layer)} merge layers")
        if list(merge_layer) != sorted(set(merge_layer)) or not all(1 <= layer <= depth for layer in merge_layer):
            shown = " ".join(map(str, merge_layer))
            raise ValueError(f"merge layers {shown} don't rise within 1 .. {depth}, the depth")
        for before, num in zip((self.region, *merge_num), merge_num, strict=False):
            if not 1 <= num <= before:
                raise ValueError(f"merge count {num} is not within 1 .. {before}, the tokens that a region has before")
        if conv_stem and (patch_size == 1 or patch_size.bit_count() > 1):
            raise ValueError(f"a conv stem needs patches of 2, 4, 8, ... pixels, not {patch_size}")
        self.image_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.regions = (self.grid[0] // 8, self.grid[1] // 8)
        embed = ConvPatchEmbed if conv_stem else PatchEmbed
        self.patch_embed = embed(channels, dim, patch_size)
        self.patch_embed_2 = embed(channels, dim, 2 * patch_size)
        self.patch_embed_4 = DepthwisePatchEmbed(channels, dim, 4 * patch_size)
        self.patch_embed_8 = DepthwisePatchEmbed(channels, dim, 8 * patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Fixed, yet parameters, since the published files store them.
        grids = [(self.regions[0] * side, self.regions[1] * side) for side in self.scales]
        tables = [nn.Parameter(sincos_2d(grid, dim), requires_grad=False) for grid in grids]
        self.pos_embed, self.pos_embed_2, self.pos_embed_4, self.pos_embed_8 = tables
        self.dropout = dropout
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, dropout, attn_drop, rate) for rate in rates)
        self.merges = {layer - 1: f"mlp{i + 1}" for i, layer in enumerate(merge_layer)}  # block index -> module
        for i, num in enumerate(merge_num):
            merge = Merge(dim, num, self.regions[0] * self.regions[1])
            self.add_module(f"norm_merge{i + 1}", merge.norm)  # the published files have it under both names
            self.add_module(f"mlp{i + 1}", merge)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation for training from scratch; what isn't named here keeps the value it has."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def by_region(self, grids: list[torch.Tensor]) -> torch.Tensor:
        """Tokens of the four scales, each (b, n, d) row by row -> sorted by regions, (b, regions * 85, d)."""
        rows, columns = self.regions
        sorted_grids = [
            rearrange(tokens, "b (r h c w) d -> b (r c) (h w) d", r=rows, c=columns, h=side)
            for tokens, side in zip(grids, self.scales, strict=True)
        ]
        return rearrange(torch.cat(sorted_grids, dim=2), "b r n d -> b (r n) d")

    def patches(self) -> list[tuple[PatchEmbed, torch.Tensor]]:
        """Patch embedding and position embedding of each scale, from patch side p to 8p."""
        embeds = (self.patch_embed, self.patch_embed_2, self.patch_embed_4, self.patch_embed_8)
        return list(zip(embeds, (self.pos_embed, self.pos_embed_2, self.pos_embed_4, self.pos_embed_8), strict=True))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> class token and the regions' tokens with their positions, (b, 1 + regions * 85, d)."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f"the image is {x.shape[-2]}x{x.shape[-1]}, the model expects {self.image_size}")
        grids = [embed(x) + table for embed, table in self.patches()]
        cls = repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0])
        return dropout(torch.cat([cls, self.by_region(grids)], dim=1), self.dropout, self.training)

    def forward_features(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Image (b, c, h, w) -> normalised tokens (b, 1 + regions * merge_num[-1], d), or the first `tokens`."""
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if i in self.merges:
                x = self.get_submodule(self.merges[i])(x)
            x = block(x, tokens if i == len(self.blocks) - 1 else None)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> logits (b, num_classes)."""
        return self.head(self.forward_features(x, tokens=1)[:, 0])  # all that the head reads: 6 % less of 12 blocks

    @torch.no_grad()
    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> attention of every block and head after the softmax, (b, depth, heads, n, n).

        n = 1 + regions * 85, the tokens before any merge, in every block: what a merged token receives goes to the
        tokens it is the mean of, by their shares in it, and a token looks with the mean of the merged tokens that hold
        it, by the same shares; rows still sum to 1. Order: class token, then the scales from patch side p to 8p, each
        row by row. Always in evaluation mode, as ViT's.
        """
        training = self.training
        self.eval()
        x = self.embed(x)
        n_regions = self.regions[0] * self.regions[1]
        shares = repeat(torch.eye(self.region, device=x.device), "m n -> b r m n", b=x.shape[0], r=n_regions)
        own_region = torch.eye(n_regions, device=x.device)
        maps = []
        for i, block in enumerate(self.blocks):
            if i in self.merges:
                merge = self.get_submodule(self.merges[i])
                tokens = rearrange(x[:, 1:], "b (r n) d -> b r n d", r=n_regions)
                shares = merge.weights(tokens).float().transpose(-2, -1) @ shares
                x = merge(x)
            spread = einsum(shares, own_region, "b r m n, r s -> b r m s n")
            spread = F.pad(rearrange(spread, "b r m s n -> b 1 (r m) (s n)"), (1, 0, 1, 0))
            spread[:, :, 0, 0] = 1
            gather = F.normalize(spread.transpose(-2, -1), p=1, dim=-1)
            maps.append(gather @ block.attn.weights(block.norm1(x)).float() @ spread)
            x = block(x)
        self.train(training)
        sizes = [n_regions * side**2 for side in self.scales]
        order = self.by_region([rearrange(part, "n -> 1 n 1") for part in torch.arange(sum(sizes)).split(sizes)])
        place = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order.flatten().argsort()]).to(x.device)
        return torch.stack(maps, dim=1)[..., place, :][..., place]

    def token_layout(self) -> dict:
        """Where tokens stand in `attention_maps`, their positions and filters; see models/__init__.py."""
        scales, start = [], 1
        for side, (embed, table) in zip(self.scales, self.patches(), strict=True):
            grid = (self.regions[0] * side, self.regions[1] * side)
            name = f"{self.image_size[0] // grid[0]} px patches"
            if isinstance(embed, ConvPatchEmbed):
                filters = (f"{name}, first convolution", embed.stem.layers[0].weight)
            else:
                filters = (name, embed.kernel() if isinstance(embed, DepthwisePatchEmbed) else embed.proj.weight)
            scales.append(dict(name=name, grid=grid, first=start, start=start, positions=table[0], filters=filters))
            start += grid[0] * grid[1]
        return dict(class_token=0, scales=scales)
