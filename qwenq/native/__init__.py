"""Machine code for this CPU, where llvmlite is installed: ``support`` says whether it can be made."""
