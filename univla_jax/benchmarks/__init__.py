"""Speed, memory and exactness beside a peer, or beside itself without a feature, in one run."""
