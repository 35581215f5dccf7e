"""`python -m autopar.cost_models.validate [runs.csv] [--json] [--plot file.svg]`: the score of the costs, on published runs.

An entry and nothing else: pricing a plan takes rules, moves and schedules, which lie above this floor (`autopar/forecast`).
"""

import sys

if __name__ == "__main__":
    from autopar.forecast.command import main

    sys.exit(main())
