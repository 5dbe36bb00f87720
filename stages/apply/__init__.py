"""`apply`: one allocation made real, and the `model` artifact that it leaves."""
