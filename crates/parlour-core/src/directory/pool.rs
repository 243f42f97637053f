//! The workers of one agent type, and which of them a key belongs to.

use std::cmp::Reverse;

use bytestring::ByteString;

use super::WorkerId;
use crate::Key;

/// The workers of an agent type.
#[derive(Clone)]
pub(super) struct Pool<P> {
    pub(super) exclusive: bool,
    /// Whether all members have the same capacity.
    even: bool,
    pub(super) members: Vec<Member<P>>,
}

/// One of them.
#[derive(Clone)]
pub(super) struct Member<P> {
    pub(super) id: WorkerId,
    pub(super) peer: P,
    pub(super) capacity: u16,
    pub(super) capabilities: Vec<ByteString>,
}

impl<P> Default for Pool<P> {
    fn default() -> Self {
        Self { exclusive: false, even: true, members: Vec::new() }
    }
}

impl<P> Pool<P> {
    /// The member that `key` belongs to.
    pub(super) fn find(&self, key: &Key) -> Option<&Member<P>> {
        match &self.members[..] {
            [only] => Some(only),
            members => {
                let key = fnv1a(key.as_str().bytes());
                match self.even {
                    // With equal capacities the greatest score is that of the greatest hash.
                    true => members.iter().max_by_key(|member| member.rank(key)),
                    false => heaviest(members, key),
                }
            }
        }
    }

    /// Looks at the members' capacities again.
    pub(super) fn weigh(&mut self) {
        let all = &self.members;
        self.even = all.windows(2).all(|two| two[0].capacity == two[1].capacity);
    }
}

impl<P> Member<P> {
    /// What decides between members of the same capacity: the greater hash, then the lower number.
    fn rank(&self, key: u64) -> (u64, Reverse<WorkerId>) {
        (mix(key ^ mix(self.id.0)), Reverse(self.id))
    }
}

/// The member with the greatest score for `key`.
///
/// This is weighted rendezvous hashing (J. Schindelhauer and G. Schomaker, "Weighted Distributed Hash
/// Tables", SPAA 2005): with `u` a member's hash as a part of 1, its score is
/// `capacity / -log(u)`. The base of the logarithm does not matter; with 2 it can be had in whole
/// numbers, which are the same on every machine.
fn heaviest<P>(members: &[Member<P>], key: u64) -> Option<&Member<P>> {
    let mut best: Option<(&Member<P>, u64)> = None;
    for member in members {
        let (hash, _) = member.rank(key);
        let Some((leader, leaders)) = best else {
            best = Some((member, minus_log2(hash)));
            continue;
        };
        // Scores as products: at most 2^38 by 2^16.
        let beats = |log: u64| {
            let (mine, theirs) =
                (log * u64::from(leader.capacity), leaders * u64::from(member.capacity));
            mine < theirs || mine == theirs && member.rank(key) > leader.rank(key)
        };
        // As -log2(u) is at least 1 - u, most are out without their logarithm.
        if beats(u64::from(u32::MAX) - (hash >> 32)) {
            let log = minus_log2(hash);
            if beats(log) {
                best = Some((member, log));
            }
        }
    }
    best.map(|(member, _)| member)
}

/// `-log2(hash / 2^64)` in units of 2^-32, by repeated squaring: each gives the next binary digit.
fn minus_log2(hash: u64) -> u64 {
    let hash = hash.max(1);
    let zeros = hash.leading_zeros();
    let mut mantissa = hash << zeros;
    let mut digits = 0;
    for _ in 0..32 {
        let square = u128::from(mantissa) * u128::from(mantissa);
        let carry = (square >> 127) as u64;
        digits = digits << 1 | carry;
        mantissa = (square >> (63 + carry)) as u64;
    }
    (u64::from(zeros + 1) << 32) - digits
}

/// FNV-1a with 64 bits (Fowler, Noll and Vo).
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Spreads a number's bits, after the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod spread;
