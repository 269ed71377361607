"""Campaigns: thousands of faults, tried one by one. They are slow; see docs/reliability.md."""
