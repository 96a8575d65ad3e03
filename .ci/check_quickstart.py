"""Fail unless the quickstart's policy beats the one it started from under both judges."""

import json
import sys


with open(sys.argv[1]) as file:
    win_rates = json.load(file)
print(json.dumps(win_rates, indent=2))
trained_on = win_rates["reward_model"]
assert trained_on["mean"] >= 0.65 and trained_on["low"] > 0.5, trained_on
assert win_rates["vader"]["mean"] > 0.5, win_rates
