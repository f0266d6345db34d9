"""How hops and collectives move their bytes."""
