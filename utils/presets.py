"""What names on the command line stand for: data sets, augmentations, normalisations. One row more is one choice more.

Imports no torch, so that a wrong name is answered at once. A program may add rows before it parses its flags, as
examples/own_model.py does.
"""

CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"

# --dataset: `read(data_dir, **other words of the row)`, a function or where to find one, gives images and classes, see
# utils/datasets.py; `split` and `labels` are overridden by --emnist_split and --labels. `file`, `folder` and `url` tell
# a user without network what to put where.
# fmt: off
DATASETS = {
    "cifar10": dict(read="utils.datasets:cifar", cls="CIFAR10", file="cifar-10-python.tar.gz", folder="", url=CIFAR),
    "cifar100": dict(read="utils.datasets:cifar", cls="CIFAR100", file="cifar-100-python.tar.gz", folder="", url=CIFAR),
    "fashionmnist": dict(read="utils.datasets:fashionmnist", file="its four .gz files", folder="FashionMNIST/raw",
                         url="https://github.com/zalandoresearch/fashion-mnist"),
    "fashionmnist-mini": dict(read="utils.datasets:fashionmnist_mini"),
    "emnist": dict(read="utils.datasets:emnist", split="mnist", file="gzip.zip", folder="EMNIST/raw",
                   url="https://www.nist.gov/itl/products-and-services/emnist-dataset"),
    "caltech101": dict(read="utils.datasets:caltech101", file="101_ObjectCategories/", folder="caltech101",
                       url="https://data.caltech.edu/records/mzrjq-6wc02"),
    "imagefolder": dict(read="utils.image_folder:image_folder", labels=None),
}
# fmt: on

# --aug: words of `utils.augment.Augment`, or of a subclass that `cls` names. `scale` is the area range of a random
# resized crop (ratio 3/4..4/3), `pad` the border of an integer crop.
AUGS = {
    "none": dict(interpolation="bilinear"),
    "flip": dict(flip=True, interpolation="bilinear"),
    "pad": dict(pad=4, flip=True, interpolation="bilinear"),
    "crop": dict(scale=(0.05, 1.0), interpolation="bilinear"),
    "mild": dict(scale=(0.6, 1.0), flip=True, interpolation="bicubic"),
    "weak": dict(scale=(1.0, 1.0), flip=True, interpolation="bicubic"),
    "strong": dict(scale=(0.8, 1.0), flip=True, operations="randaugment", interpolation="bicubic"),
    "dems": dict(scale=(0.2, 1.0), flip=True, operations="jitter", aug_prob=0.6, interpolation="bicubic"),
    "keras": dict(scale=(0.8, 1.0), flip=True, rotation=7.2, interpolation="bilinear"),  # RandomRotation(0.02)
}

# --normalize: mean and standard deviation of each channel, of pixels in 0..1.
NORMALIZE = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

PICTURES = ("attention", "position", "patches", "errors")  # --plot
MAX_IMAGES = 8  # that pictures of attention have room for
