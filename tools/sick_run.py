"""Pack one sick run for the notebook with the slider.

Usage (from the repository root): python tools/sick_run.py [--cache runs/collapse_factors]
It takes the patient with the highest index of nbs/experiments/collapse_look.json, from its run in the
cache. Where there is no record, or no patient in it, it is the matcher of one layer that collapses in
`study small-cure`, trained here in seconds. At most a megabyte is written to nbs/experiments/sick_run.
"""

import argparse
import sys
from pathlib import Path

from loftr_curriculum.io.files import read_json
from loftr_curriculum.studies.collapse_factors import pack_sick_run, patients
from loftr_curriculum.studies.small_cure import record_collapse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--factors", default="nbs/experiments/collapse_look.json")
    parser.add_argument("--cache", default="runs/collapse_factors")
    parser.add_argument("--out", default="nbs/experiments/sick_run")
    options = parser.parse_args()
    try:
        if Path(options.factors).is_file() and patients(read_json(options.factors)):
            print(pack_sick_run(options.factors, options.cache, options.out))
        else:
            print(record_collapse(options.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
