"""Fail unless the quickstart's policy beats the initial one under both judges that it was not trained on."""

import json
import sys


with open(sys.argv[1]) as file:
    win_rates = json.load(file)
print(json.dumps(win_rates, indent=2))
for judge in ("vader", "on_topic"):
    assert win_rates[judge]["low"] > 0.55, win_rates[judge]
