"""The two ends of a session: stages that do as they are told, in this process or in others, and what is heard of them."""
