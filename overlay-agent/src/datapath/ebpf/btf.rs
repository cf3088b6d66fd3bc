//! Where a field lies in one of the kernel's structures, by the kernel's own description (BTF, Documentation/bpf/btf.rst).
//!
//! Read record by record: the libraries for BTF build a table of all types of the kernel, in 80 MB of memory, for one number.

use anyhow::{Context as _, Result, ensure};

/// The description of the running kernel.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;

/// The offset in bytes of `field` in the kernel's `struct structure`; `None` when it has no such field.
/// Fails when the kernel describes no types, or not this one.
pub(super) fn offset(structure: &str, field: &str) -> Result<Option<u32>> {
    let bytes = std::fs::read(KERNEL)
        .with_context(|| format!("read {KERNEL}: the kernel is built without CONFIG_DEBUG_INFO_BTF"))?;
    find(&bytes, structure, field).with_context(|| format!("read {KERNEL}"))
}

fn find(bytes: &[u8], structure: &str, field: &str) -> Result<Option<u32>> {
    let magic = u16::from_ne_bytes(*bytes.first_chunk().context("it is empty")?);
    ensure!(magic == MAGIC, "it is no BTF of this machine's byte order");
    let [header_len, types_at, types_len, strings_at, strings_len] = words(bytes, 4)?;
    let section = |at: u32, len: u32| {
        let start = (header_len as usize).checked_add(at as usize)?;
        bytes.get(start..start.checked_add(len as usize)?)
    };
    let mut types = section(types_at, types_len).context("its types are cut off")?;
    let strings = section(strings_at, strings_len).context("its strings are cut off")?;
    let is_named = |at: u32, name: &str| {
        let rest = strings.get(at as usize..).and_then(|rest| rest.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    };
    while !types.is_empty() {
        let [name, info, _size] = words(types, 0)?;
        let (kind, count) = (info >> 24 & 0x1f, info as usize & 0xffff);
        let size = 12
            + trailing(kind).with_context(|| format!("it has types of an unknown kind {kind}"))?
                * match kind {
                    // These have one record, or none, whatever the count says.
                    3 | 14 | 17 | 1 => 1,
                    _ => count,
                };
        let (this, rest) = types.split_at_checked(size).context("a type is cut off")?;
        types = rest;
        if kind != STRUCT || !is_named(name, structure) {
            continue;
        }
        for member in this.get(12..).unwrap_or_default().chunks_exact(12) {
            let [name, _type, position] = words(member, 0)?;
            if is_named(name, field) {
                // With this flag, the upper bits are the width of a bit field.
                let bits = if info >> 31 == 0 { position } else { position & 0x00ff_ffff };
                ensure!(bits % 8 == 0, "{field} of {structure} does not start at a byte");
                return Ok(Some(bits / 8));
            }
        }
        return Ok(None);
    }
    anyhow::bail!("it does not describe {structure}")
}

/// Bytes of each record behind a type of this kind, of which there are as many as the type's count says, or one.
fn trailing(kind: u32) -> Option<usize> {
    match kind {
        // Integer, variable, declaration tag.
        1 | 14 | 17 => Some(4),
        // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag.
        2 | 7..=12 | 16 | 18 => Some(0),
        // Array, struct, union, section, enum of 64 bits.
        3..=5 | 15 | 19 => Some(12),
        // Enum, function prototype.
        6 | 13 => Some(8),
        _ => None,
    }
}

/// Numbers of 32 bits from `at` on.
fn words<const N: usize>(bytes: &[u8], at: usize) -> Result<[u32; N]> {
    let mut words = [0; N];
    let source = bytes.get(at..at + 4 * N).context("it is cut off")?;
    for (word, bytes) in words.iter_mut().zip(source.chunks_exact(4)) {
        *word = u32::from_ne_bytes(*bytes.first_chunk().unwrap_or(&[0; 4]));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRINGS: &[u8] = b"\0int\0pair\0first\0second\0";

    /// `struct pair { int first; int second; }` behind an integer and an array.
    fn example() -> Vec<u8> {
        let mut types: Vec<u32> = vec![1, 1 << 24, 4, 32];
        types.extend([0, 3 << 24, 0, 1, 1, 7]);
        types.extend([5, (STRUCT << 24) | 2, 8, 10, 1, 0, 16, 1, 32]);
        let length = 4 * types.len() as u32;
        let mut bytes = vec![];
        bytes.extend(MAGIC.to_ne_bytes());
        bytes.extend([1, 0]);
        for word in [24, 0, length, length, STRINGS.len() as u32].iter().chain(&types) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(STRINGS);
        bytes
    }

    #[test]
    fn fields_are_found_by_name() {
        let bytes = example();
        assert_eq!(find(&bytes, "pair", "first").unwrap(), Some(0));
        assert_eq!(find(&bytes, "pair", "second").unwrap(), Some(4));
        assert_eq!(find(&bytes, "pair", "sec").unwrap(), None);
        assert!(find(&bytes, "pai", "first").unwrap_err().to_string().contains("pai"));
    }

    #[test]
    fn damaged_descriptions_are_errors() {
        let bytes = example();
        for length in 0..bytes.len() - STRINGS.len() {
            assert!(find(&bytes[..length], "pair", "second").is_err(), "{length} bytes");
        }
        for position in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = bytes.clone();
                damaged[position] = value;
                // Whatever it says, it is read to the end.
                let _ = find(&damaged, "pair", "second");
            }
        }
    }

    #[test]
    fn this_kernel_describes_socket_buffers() {
        assert!(offset("sk_buff", "len").unwrap().is_some_and(|offset| offset > 0));
        assert_eq!(offset("sk_buff", "no_such_field").unwrap(), None);
        assert!(offset("no_such_structure", "len").is_err());
    }
}
