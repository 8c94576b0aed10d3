# Delock
