"""What a distillation epoch costs, over a plain epoch of the same student, side by side in one run.

    .venv/bin/python benchmarks/step_cost.py [--steps 40] [--rounds 5]

Ways are interleaved round by round; the figure is the median over rounds of CPU seconds, as a ratio to the plain way.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from compression.augment import ShiftFlip
from compression.data import FashionMnist, load_dataset
from compression.data.dataset import Dataset, Split
from compression.distill import CrossEntropy, Kd, Uniform, distillation_step, live_distillation_step, plain_step
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import TrainConfig, fit
from compression.zoo.residual_cnn import ResidualCnn

AUGMENT = ShiftFlip(pad=2, flip=True)
TEACHER = ResidualCnn(widths=(32, 48, 96), depths=(1, 1, 1), strides=(2, 1, 2), stem_width=16)
STUDENT = ResidualCnn(widths=(16, 16, 32), depths=(1, 1, 1), strides=(1, 2, 2), stem_width=16, stem_stride=2)
LOSSES = (CrossEntropy(weight=0.5), Kd(weight=0.5, temperature=2.0))
BATCH = 256


def first(split: Split, count: int) -> Split:
    return Split(images=split.images[:count], labels=split.labels[:count], ids=split.ids[:count])


def subset(dataset: Dataset, steps: int) -> Dataset:
    return replace(dataset, train=first(dataset.train, steps * BATCH), validation=first(dataset.validation, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps per epoch")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = subset(load_dataset(FashionMnist(), seed=0), arguments.steps)
    teachers = [TEACHER.build(10, dataset.input_shape).eval() for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        stored = []
        for number, teacher in enumerate(teachers):
            place = Path(folder) / str(number)
            write_teacher_outputs(teacher, dataset, OutputsSpec(views=1, seed=0, augment=AUGMENT), place)
            stored.append(StoredOutputs.open(place))
        ways = {
            "plain": plain_step(),
            "stored, 1 teacher": distillation_step(LOSSES, Uniform(), stored[:1]),
            "stored, 2 teachers": distillation_step(LOSSES, Uniform(), stored),
            "live, 1 teacher": live_distillation_step(LOSSES, Uniform(), teachers[:1]),
            "live, 2 teachers": live_distillation_step(LOSSES, Uniform(), teachers),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        config = TrainConfig(epochs=1, batch_size=BATCH)
        for turn in range(arguments.rounds + 1):
            for way, step in ways.items():
                student = STUDENT.build(10, dataset.input_shape)
                started = time.process_time()
                fit(student, step, dataset, config, seed=0, augment=AUGMENT, views=1)
                if turn:  # the first round warms up
                    seconds[way].append(time.process_time() - started)
    plain = seconds["plain"]
    print("| epoch | CPU ms per step | ratio to plain (median of rounds) | range |\n|---|---|---|---|")
    for way, values in seconds.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        per_step = median(values) / arguments.steps * 1e3
        print(f"| {way} | {per_step:.1f} | {median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")


if __name__ == "__main__":
    main()
