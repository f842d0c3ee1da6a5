"""A contestant of benchmarks/against_trl.py: `camopd recover`, without its checkpoints, for the others write none.

Takes the same job as with_torch.py, and ``parameters``, the recipe's values that it runs with.
"""

import json
import sys
import tempfile

from turns import Turns

from camopd import prepare
from camopd.config import load_recipe
from camopd.recover import Session
from camopd.store import Store


def main(job, folder):
    store = Store()
    plan = prepare.run(load_recipe(job["recipe"], {**job["parameters"], "output": folder}), store=store)
    session = Session(plan, 1, store)
    turns = Turns(session.trainer.model.save_pretrained)
    while True:
        session.step()
        turns.update_done()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(json.loads(sys.argv[1]), scratch)
