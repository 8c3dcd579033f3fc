"""Train every configuration in a JSON list, in this process or in each of several ranks."""

import json
import sys
from pathlib import Path


def train_all(path):
    from mmgrpo import build
    from mmgrpo.config import load_config

    for document in json.loads(Path(path).read_text()):
        build.train(load_config(document))


if __name__ == "__main__":
    train_all(sys.argv[1])
