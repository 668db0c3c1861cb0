//! Avro's binary encoding, read from a slice.

/// Bytes that are not what the schema says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Byte at which that shows, counted from the start of the Avro data.
    pub at: usize,
    /// What is wrong.
    pub what: &'static str,
}

/// A position in a record.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    length: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, length: bytes.len() }
    }

    /// Bytes read so far.
    #[inline]
    pub(crate) fn position(&self) -> usize {
        self.length - self.rest.len()
    }

    /// Bytes left.
    #[inline]
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    #[cold]
    pub(crate) fn broken(&self, what: &'static str) -> Broken {
        Broken { at: self.position(), what }
    }

    #[cold]
    fn cut_short(&self) -> Broken {
        Broken { at: self.length, what: "the record is cut short" }
    }

    #[inline]
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Broken> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.cut_short())?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(|| self.cut_short())?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    pub(crate) fn boolean(&mut self) -> Result<bool, Broken> {
        match self.rest.first() {
            Some(byte @ (0 | 1)) => {
                self.rest = &self.rest[1..];
                Ok(*byte == 1)
            }
            Some(_) => Err(self.broken("a boolean is neither 0 nor 1")),
            None => Err(self.cut_short()),
        }
    }

    /// A zig-zag variable-length integer of at most 64 bits.
    #[inline]
    pub(crate) fn long(&mut self) -> Result<i64, Broken> {
        let mut bits = 0u64;
        for (index, &byte) in self.rest.iter().enumerate().take(10) {
            if index == 9 && byte > 1 {
                break;
            }
            bits |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                self.rest = &self.rest[index + 1..];
                return Ok((bits >> 1) as i64 ^ -((bits & 1) as i64));
            }
        }
        Err(if self.rest.len() < 10 { self.cut_short() } else { self.broken("a number has more than 64 bits") })
    }

    #[inline]
    pub(crate) fn int(&mut self) -> Result<i32, Broken> {
        let before = self.position();
        let value = self.long()?;
        i32::try_from(value).map_err(|_| Broken { at: before, what: "an int has more than 32 bits" })
    }

    /// An index below `count`, else `what` is wrong.
    #[inline]
    pub(crate) fn index(&mut self, count: usize, what: &'static str) -> Result<usize, Broken> {
        let before = self.position();
        let index = self.long()?;
        usize::try_from(index).ok().filter(|index| *index < count).ok_or(Broken { at: before, what })
    }

    /// A length and as many bytes.
    #[inline]
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Broken> {
        let before = self.position();
        let length = self.long()?;
        let length = usize::try_from(length).map_err(|_| Broken { at: before, what: "a length is negative" })?;
        self.take(length)
    }
}

/// Appends a zig-zag variable-length integer.
pub(crate) fn write_long(value: i64, out: &mut Vec<u8>) {
    let mut bits = ((value << 1) ^ (value >> 63)) as u64;
    while bits >= 0x80 {
        out.push(bits as u8 | 0x80);
        bits >>= 7;
    }
    out.push(bits as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case(&[], "cut short", 0)]
    #[case(&[0x80], "cut short", 1)]
    #[case(&[0xff; 9], "cut short", 9)]
    #[case(&[0xff; 10], "more than 64 bits", 0)]
    #[case(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], "more than 64 bits", 0)]
    fn refuses_broken_integers(#[case] bytes: &[u8], #[case] what: &str, #[case] at: usize) {
        let broken = Cursor::new(bytes).long().unwrap_err();
        assert!(broken.what.contains(what), "{broken:?}");
        assert_eq!(broken.at, at);
    }

    proptest! {
        #[test]
        fn integers_survive(value: i64, small in -70i64..70) {
            for value in [value, small, i64::from(value as i32)] {
                let mut bytes = Vec::new();
                write_long(value, &mut bytes);
                let mut cursor = Cursor::new(&bytes);
                prop_assert_eq!(cursor.long(), Ok(value));
                prop_assert_eq!(cursor.remaining(), 0);
            }
        }
    }
}
