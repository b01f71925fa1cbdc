"""Benchmark scorers (RewardBench 2, RM-Bench), batch scoring and statistics."""
