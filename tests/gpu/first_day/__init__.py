"""What the first half hour on a GPU measures: see run_scripts/gpu_first_day.sh. Needs no torch until a step runs."""
