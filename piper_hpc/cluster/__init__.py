"""Where a cluster's facts come from: measurements turned into curves, or data sheets that say so."""
