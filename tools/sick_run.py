"""Pack one sick run of `study collapse-factors` for the notebook with the slider.

Usage (from the repository root): python tools/sick_run.py [--cache runs/collapse_factors]
It takes the patient with the highest index of nbs/experiments/collapse_study.json and writes at most a
megabyte to nbs/experiments/sick_run; where the record has no patient it says so and writes nothing.
"""

import argparse
import sys

from loftr_curriculum.studies.collapse_factors import pack_sick_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--factors", default="nbs/experiments/collapse_study.json")
    parser.add_argument("--cache", default="runs/collapse_factors")
    parser.add_argument("--out", default="nbs/experiments/sick_run")
    options = parser.parse_args()
    try:
        print(pack_sick_run(options.factors, options.cache, options.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
