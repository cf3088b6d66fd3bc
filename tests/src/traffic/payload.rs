//! Payloads of datagrams: random bytes that both ends recognize.

use rand::{RngCore, SeedableRng, rngs::SmallRng};

/// The bytes of datagram number `index` with `size` bytes. The first bytes, as far as there is room, are the index.
pub fn datagram(index: u32, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    SmallRng::seed_from_u64(u64::from(index) << 32 | size as u64).fill_bytes(&mut bytes);
    bytes.iter_mut().zip(index.to_be_bytes()).for_each(|(byte, part)| *byte = part);
    bytes
}

/// The echo server's answer to a datagram: the bytes in reverse order, each inverted. Request and answer differ, so a check of
/// the answer does not pass by accident.
pub fn answer(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().rev().map(|byte| !byte).collect()
}

/// The index of the datagram that `answer` answers; `None` when it is too short to carry one.
pub fn answered_index(answer: &[u8]) -> Option<u32> {
    let end = answer.last_chunk::<4>()?;
    let [d, c, b, a] = *end;
    Some(!u32::from_be_bytes([a, b, c, d]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_its_datagram() {
        for (index, size) in [(0, 4), (1, 5), (70_000, 1444)] {
            assert_eq!(answered_index(&answer(&datagram(index, size))), Some(index));
        }
        assert_eq!(answered_index(&[1, 2, 3]), None);
    }

    #[test]
    fn datagrams_differ_and_answers_are_not_echoes() {
        assert_ne!(datagram(1, 64), datagram(2, 64));
        let bytes = datagram(3, 100);
        assert_ne!(answer(&bytes), bytes);
        assert_eq!(answer(&answer(&bytes)), bytes);
    }
}
