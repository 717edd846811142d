"""Write a trained model for other programs: timm-named `.safetensors`, torch.export's `.pt2`, or `.onnx`.

Each is read back and compared with the model before it gets its name. The file `NAME.json` beside it says how images
are prepared, what the classes are, and what made the model.
"""

import copy
import json
import os
from pathlib import Path

import torch
from torch import nn

from utils.cli import UserError, refuse, refusing

FORMATS = (".safetensors", ".pt2", ".onnx")


def _write(model: nn.Module, x: torch.Tensor, path: Path):
    """Write the file, read it back, and return what it computes: images (b, 3, h, w) -> logits."""
    shapes = ({0: torch.export.Dim("batch")},)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        save_file({name: value.clone().contiguous() for name, value in model.state_dict().items()}, path)
        model = copy.deepcopy(model)
        model.load_state_dict(load_file(path))
        return model
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)
        return torch.export.load(path).module()
    from onnx.reference import ReferenceEvaluator

    words = dict(input_names=["images"], output_names=["logits"], external_data=False, verbose=False)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, **words)
    session = ReferenceEvaluator(str(path))
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def export(model: nn.Module, path: str | os.PathLike, facts: dict, atol: float = 1e-4) -> Path:
    """Write `model`, on the CPU and in float32, to `path`, and `facts` to the `.json` beside it, whose path it returns.

    `facts` or `model` have the `image_size`. The logits of 3 random images agree within `atol` of their largest size.
    UserError: an unknown kind of file, a package that is not installed, or logits that don't agree.
    """
    path = Path(path)
    refuse(path.suffix not in FORMATS, f"{path}: a name ends with {', '.join(FORMATS)}")
    model = copy.deepcopy(model).float().cpu().eval()
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with torch.no_grad(), refusing(f"{path}: not exported", "nothing is left of it"):
            size = [facts["image_size"]] * 2 if "image_size" in facts else model.image_size
            x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
            try:
                written = _write(model, x[:2], temporary)
            except ImportError as error:
                raise UserError(f"{path}: needs the package {error.name}; pip install {error.name}") from None
            expected = model(x)
            error = (written(x) - expected).abs().max() / expected.abs().max()
            refuse(not error < atol, f"{path}: its logits differ by {error:.1e} of the model's, so it is not kept")
            beside = path.with_suffix(".json")
            beside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return beside
