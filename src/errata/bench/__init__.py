"""Probes, metrics and verification: did the correction take, and did nothing else move?"""
