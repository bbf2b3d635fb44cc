"""Is it right, how fast is it, and does it pay, on a GPU?

    python tools/gpu                      # all of it, in a quarter of an hour
    python tools/gpu --parts right speed
    python tools/gpu --quick              # tiny, to see that all of it runs
    python tools/gpu --pack pictures.npz --data-dir DIR   # for the last part

Each part runs in a process of its own: what one of them does to TensorFlow
(virtual devices, deterministic kernels, a crash) is not the others' business.
Tables are printed worst first, as soon as they are known, and the full figures
saved as lines of JSON. Nothing is downloaded: the last part trains on pictures
of CIFAR-10 in a file that `--pack` writes beforehand, and is left out without.

Without a GPU everything runs on the CPU, to try the script out; memory is not
measured then. TensorFlow's wheel for CUDA has to be installed.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]

# Seconds that a part may take, the most important first.
PARTS = {
    "right": 240,
    "identical": 60,
    "replicas": 90,
    "speed": 400,
    "pictures": 300,
}


def main():
    args = parse_args()
    if args.pack:
        return pack(args)
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    failed = []
    for part in args.parts:
        left = end - time.monotonic()
        if left < 10:
            print(f"{part}: no time left")
            continue
        if part == "pictures" and not args.pictures:
            print("pictures: no --pictures")
            continue
        print(f"\n== {part}, {min(left, PARTS[part]):.0f} s", flush=True)
        if run(part, args, min(left, PARTS[part])):
            failed.append(part)
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return bool(failed)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    add("--quick", action="store_true", help="tiny nets and few steps")
    add("--seconds", type=float, default=840, help="for all parts together")
    add("--output", type=pathlib.Path, default=pathlib.Path("gpu_output"))
    add("--pictures", type=pathlib.Path, help="what --pack wrote")
    add("--pack", type=pathlib.Path, help="write pictures of CIFAR-10 there")
    add("--data-dir", help="where TensorFlow Datasets keeps its data")
    return parser.parse_args()


def run(part, args, seconds):
    """Run a part in a process of its own; return its exit status."""
    command = [sys.executable, str(FOLDER / f"{part}.py")]
    command += ["--seconds", str(seconds), "--output", str(args.output)]
    command += ["--quick"] if args.quick else []
    command += ["--pictures", str(args.pictures)] if part == "pictures" else []
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}
    try:
        # A part ends by itself at its time; this is for one that hangs.
        return subprocess.run(
            command, env=environment, timeout=1.5 * seconds + 60
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: hung")
        return 1


def pack(args):
    """Write pictures and labels as arrays, where there is a data set."""
    import numpy as np
    import tensorflow_datasets as tfds

    loaded = tfds.load(
        "cifar10", split="train", data_dir=args.data_dir, as_supervised=True
    )
    pictures, labels = zip(*tfds.as_numpy(loaded.take(10_000)))
    np.savez_compressed(
        args.pack, x=np.stack(pictures), y=np.array(labels, "uint8")
    )
    print(f"{len(labels)} pictures, {args.pack.stat().st_size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
