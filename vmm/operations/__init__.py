"""Operations over all workers: tables of steps, and what goes through them."""
