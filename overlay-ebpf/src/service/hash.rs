//! Hashes of clients and endpoints.

/// Spreads a client's number, which may be small and sequential, over 32 bits: the finalizer of MurmurHash3 (fmix64). It need not
/// resist an attacker: a client decides about its own connections only.
#[inline(always)]
pub fn hash(client: u64) -> u32 {
    (mix(client) >> 32) as u32
}

/// The same with 64 bits. A bijection.
#[inline(always)]
pub fn mix(value: u64) -> u64 {
    let h = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_clients_spread_evenly() {
        // 16 buckets of a binomial distribution: 5 standard deviations are exceeded once in 100 000 times.
        let clients = 16_000_u32;
        let mut buckets = [0_u32; 16];
        for client in 0..clients {
            buckets[hash(u64::from(client)) as usize % 16] += 1;
        }
        let expected = f64::from(clients) / 16.0;
        let deviation = (expected * 15.0 / 16.0).sqrt();
        for count in buckets {
            assert!((f64::from(count) - expected).abs() < 5.0 * deviation, "{buckets:?}");
        }
    }

    #[test]
    fn the_finalizer_has_its_published_values() {
        // fmix64 of MurmurHash3.
        assert_eq!(mix(0), 0);
        assert_eq!(mix(1), 0xb456_bcfc_34c2_cb2c);
    }
}
