"""Print the ids of the tests that pytest has skipped, by its --junitxml report. Those of *_vllm.py are left out."""

import sys
from xml.etree import ElementTree


for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    module = case.get("classname") or case.get("name") or ""  # a module that was skipped whole has no class
    if case.find("skipped") is not None and not module.endswith("_vllm"):
        name = f"::{case.get('name')}" if case.get("classname") else ""
        print(f"{module.replace('.', '/')}.py{name}")
