"""A whole experiment in one file: a small ViT on 10,000 images of Fashion-MNIST, which are in the repository.

    python examples/minimal.py                # under a minute on 2 CPU cores, 85.7 % of 2,000 test images

Copy it, and change what you like: every part is a function or a class of its own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of models/ and utils/

import torch
import torch.nn.functional as F

from eval import evaluate
from models import create_model
from utils.augment import Augment
from utils.data_utils import eval_batches, train_batches
from utils.datasets import load_data
from utils.scheduler import learning_rate

STEPS, BATCH, SIZE, LR, SEED = 1000, 100, 28, 2e-3, 1
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(SEED)

data = load_data("fashionmnist-mini").to(device)
look = dict(mean=[0.5] * 3, std=[0.5] * 3, device=device)  # pixels in -1..1
augment, as_it_is = Augment(SIZE, flip=True, **look), Augment(SIZE, **look)
sizes = dict(patch_size=7, dim=96, depth=4, heads=4, mlp_dim=192, dropout=0.0)
model = create_model("ViT-Ti_16", image_size=SIZE, num_classes=len(data.classes), **sizes).to(device)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

batches = train_batches(data.train, augment, seed=SEED, stop=STEPS, batch_size=BATCH, device=device)
for step, (images, labels) in enumerate(batches, 1):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, base_lr=LR, num_steps=STEPS, warmup_steps=STEPS // 10)
    loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)

test = eval_batches(data.test, as_it_is, batch_size=500, device=device)
score = evaluate(model, test, len(data.classes), device)
print(f"test accuracy {100 * score['accuracy']:.2f} % ({score['correct']} of {score['seen']})")
