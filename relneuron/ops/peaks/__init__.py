"""Where neurons are largest, and how their values are spread: peaks, their K best, histograms."""
