"""Evaluation: metrics of videos, the motion-control report, figures and pages, and the demo that shows the chain."""
