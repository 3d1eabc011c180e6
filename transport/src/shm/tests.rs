//! What only this provider can get wrong: rogue peers on the socket and in shared memory.
